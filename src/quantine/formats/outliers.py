"""Where outliers are: the gaps between them, in one stream over all rows.

Outliers are few and scattered, so the number of inliers before each costs less than a column for
each and an offset for each row: about 8 bits at a share of 1%, where 16-bit columns with 32-bit row
offsets cost 21 for a matrix of 600 inputs. Byte by byte in docs/format.md, section "sparse".
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.core.sparse import Csr
from quantine.errors import FormatError

GAP_TYPES: Final = {torch.uint8: 2**8 - 1, torch.int16: 2**16 - 1}
"""Item types of a stream, and the item that means: as many inliers, and no outlier after them."""
FEWEST: Final = 2.0**-32
"""Smallest share that is reckoned with: below it a matrix has no outliers to speak of."""


def encode_gaps(outliers: Csr) -> Tensor:
    """The places of ``outliers`` as a stream of gaps, in whichever item type is smaller.

    Every outlier is one item, the number of inliers since the one before it, counted over the
    matrix row after row. Before it stands, as often as needed, the item type's largest value
    ``m``, for ``m`` inliers with no outlier after them.
    """
    places = outliers.row_indices() * outliers.shape[1] + outliers.columns
    gaps = places.diff(prepend=places.new_tensor([-1])) - 1
    streams = [_stream(gaps, dtype, longest) for dtype, longest in GAP_TYPES.items()]
    return min(streams, key=lambda stream: stream.nbytes)


def expected_bytes(share: float) -> float:
    """Bytes of one outlier, value and gap, where a random ``share`` of weights are outliers."""
    if share <= 0:
        return 0.0
    share = max(share, FEWEST)
    gaps = [dtype.itemsize / (1 - (1 - share) ** longest) for dtype, longest in GAP_TYPES.items()]
    return torch.float16.itemsize + min(gaps)


def decode_gaps(stream: Tensor, values: Tensor, shape: tuple[int, int]) -> Csr:
    """Invert `encode_gaps`; ``values`` ``[entries]`` float.

    Raises:
        FormatError: the stream does not hold one place for each value, or leaves the matrix.
    """
    longest = GAP_TYPES[stream.dtype]
    items = stream.long() & longest
    ends = items != longest
    places = (items + ends).cumsum(0)[ends] - 1
    whole = len(places) == len(values) and bool(ends[-1:].all())
    if not whole or (len(places) and int(places[-1]) >= shape[0] * shape[1]):
        raise FormatError("outlier_gap is damaged: its places do not fit outlier_value and shape")
    rows = places.div(shape[1], rounding_mode="floor")
    offsets = places.new_zeros(shape[0] + 1)
    torch.cumsum(rows.bincount(minlength=shape[0]), 0, out=offsets[1:])
    return Csr(offsets, places - rows * shape[1], values, shape)


def _stream(gaps: Tensor, dtype: torch.dtype, longest: int) -> Tensor:
    skips = gaps.div(longest, rounding_mode="floor")
    stream = gaps.new_full((len(gaps) + int(skips.sum()),), longest)
    stream[(skips + 1).cumsum(0) - 1] = gaps % longest
    # The two's complement of 16 bits: PyTorch has no arithmetic on uint16.
    return stream.to(dtype)
