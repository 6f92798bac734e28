"""Loading quantized models from their directories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantine.core.ambient import own_state
from quantine.core.arithmetic import ARITHMETICS, Arithmetic, is_arithmetic
from quantine.core.device import device_named
from quantine.errors import FormatError, PlanError, QuantineError, cut, is_out_of_memory
from quantine.formats.foreign.spqr.layout import METHOD as SPQR_METHOD
from quantine.formats.imported import is_foreign, source_files
from quantine.runtime.packed import packed_modules
from quantine.runtime.spqr_directory import translated_config
from quantine.source.locate import locate
from quantine.source.model_source import UNREADABLE, ModelSource
from quantine.source.names import listed
from quantine.source.weight_files import weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@own_state()
def load(
    directory: str | Path,
    dtype: torch.dtype | str = "auto",
    arithmetic: Arithmetic | None = None,
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, Any]:
    """Load a quantized model, written by `quantine.quantize` or by SpQR, and its tokenizer.

    Weights stay packed; the files are mapped into memory, not copied.

    Args:
        directory: an output directory, or the hub id of an uploaded one; or one whose config.json
            says ``quant_method: spqr``, whoever wrote it.
        dtype: dtype of activations and of weights that are not quantized; ``"auto"`` is that of the
            source model.
        arithmetic: arithmetic of products with packed matrices, see `quantine.kernels.matrix`;
            ``None`` takes what the directory says (``exact``, if it says nothing).
        device: device of the model, by PyTorch's name; or ``"auto"``. Kernels compute on the CPU
            and on NVIDIA's GPUs; elsewhere PyTorch decodes the weights of a matrix whenever it is
            multiplied.

    Returns:
        ``(model, tokenizer)``, the model in evaluation mode.

    Raises:
        BackendUnavailable: there is no such device.
        CheckpointError: there is no such directory.
        FormatError: it holds no quantized model, or is damaged.
        PlanError: there is no such arithmetic or dtype.
    """
    source = locate(directory)
    return load_packed(source, dtype, arithmetic, device), source.tokenizer()


@own_state()
def load_packed(
    source: ModelSource,
    dtype: torch.dtype | str = "auto",
    arithmetic: Arithmetic | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load the quantized model of ``source`` without its tokenizer.

    Arguments and errors are those of `load`.
    """
    from transformers import AutoModelForCausalLM

    where = device_named(device)
    wanted = _dtype_named(dtype)
    if arithmetic is not None and not is_arithmetic(arithmetic):
        raise PlanError(f"arithmetic must be one of {', '.join(ARITHMETICS)}, not {arithmetic!r}")
    if not source.is_quantized():
        raise FormatError(
            f"{source.name} was not written by quantine (its config.json says otherwise): quantize "
            "it first, or load it with transformers"
        )
    try:
        weight_files(source.directory)
        is_spqr = source.quant_method() == SPQR_METHOD
        config = translated_config(source) if is_spqr else source.config()
        source.bare_model(config)  # whose errors are those of config.json, and not of weights
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.directory, config=config, dtype=wanted, output_loading_info=True
        )
    except QuantineError:
        raise
    except (*UNREADABLE, MemoryError) as error:
        fits = not is_out_of_memory(error)
        said = (
            f"cannot be loaded, it is damaged: {cut(error)}" if fits else "does not fit in memory"
        )
        raise FormatError(f"{source.directory} {said}") from error
    model, info = loaded
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[kind]:
            names = sorted(key if isinstance(key, str) else key[0] for key in info[kind])
            raise FormatError(
                f"{source.directory} is damaged: {kind.replace('_', ' ')} {listed(names)}"
            )
    if arithmetic is not None:
        for _, module in packed_modules(model):
            module.arithmetic = arithmetic
    packed: PreTrainedModel = model.eval().to(where)
    return packed


def _dtype_named(dtype: torch.dtype | str) -> torch.dtype | str:
    """The dtype that PyTorch calls ``dtype``, or ``"auto"``.

    Raises:
        PlanError: there is no such dtype, or it holds no fractions.
    """
    import torch

    if dtype == "auto":
        return "auto"
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise PlanError(
            f"activations cannot be {dtype!r}: dtype must be auto, float32, bfloat16 or float16"
        )
    return found


@own_state()
def load_model(
    source: ModelSource, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load the model of ``source``, quantized or not, to compute in ``dtype`` on ``device``.

    What other programs packed becomes floats, the same that a run of quantine reads.

    Raises:
        BackendUnavailable: there is no such device.
        QuantineError: the model cannot be read, see `ModelSource.float_model` and `source_files`.
    """
    where = device_named(device)
    if source.is_quantized():
        return load_packed(source, dtype, device=where)
    packed = source.gguf_file is not None or is_foreign(source)
    loaded: Any = source.float_model(dtype, source_files(source) if packed else None)
    model: PreTrainedModel = loaded.to(where)
    return model
