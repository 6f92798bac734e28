"""Which recording of a CUDA graph is going on in a stream."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Final

import torch

GOING_ON: Final = 1
"""``CU_STREAM_CAPTURE_STATUS_ACTIVE`` of CUDA."""


def recording(stream: torch.cuda.Stream) -> object | None:
    """What tells the recording in ``stream``, the current one, from all others of the process.

    Recordings in one stream, one after the other, are different ones. PyTorch does not tell them
    apart, so CUDA is asked.

    Returns:
        ``None`` if nothing is recorded. Something that equals nothing else where CUDA does not say.
    """
    if not torch.cuda.is_current_stream_capturing():
        return None
    ask = _capture_info()
    if ask is None:
        return object()
    status, number = ctypes.c_int(), ctypes.c_uint64()
    handle = ctypes.c_void_p(stream.cuda_stream)
    failed = ask(handle, ctypes.byref(status), ctypes.byref(number), None, None, None)
    return object() if failed or status.value != GOING_ON else number.value


@cache
def _capture_info() -> Any:
    """CUDA's own function, ``None`` where its driver has none."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
