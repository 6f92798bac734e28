"""Loading quantized models from their directories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantine.core.arithmetic import ARITHMETICS, Arithmetic, is_arithmetic
from quantine.core.device import device_named
from quantine.errors import FormatError, PlanError, QuantineError, cut
from quantine.formats.foreign.spqr.layout import METHOD as SPQR_METHOD
from quantine.runtime.modules import packed_modules
from quantine.runtime.spqr_directory import translated_config
from quantine.source.checkpoint import weight_files
from quantine.source.locate import ModelSource, locate

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


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
        device: device of the model, by PyTorch's name. Native kernels compute on the CPU only;
            elsewhere PyTorch decodes the weights of a matrix whenever it is multiplied.

    Returns:
        ``(model, tokenizer)``, the model in evaluation mode.

    Raises:
        BackendUnavailable: there is no such device.
        CheckpointError: there is no such directory.
        FormatError: it holds no quantized model, or is damaged.
        PlanError: there is no such arithmetic.
    """
    source = locate(directory)
    return load_packed(source, dtype, arithmetic, device), source.tokenizer()


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
    if arithmetic is not None and not is_arithmetic(arithmetic):
        raise PlanError(f"arithmetic must be one of {', '.join(ARITHMETICS)}, not {arithmetic!r}")
    if not source.is_quantized():
        raise FormatError(
            f"{source.name} was not written by quantine (its config.json says otherwise): quantize "
            "it first, or load it with transformers"
        )
    try:
        weight_files(source.directory)
        foreign = source.quant_method() == SPQR_METHOD
        config = translated_config(source) if foreign else source.config()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.directory, config=config, dtype=dtype, output_loading_info=True
        )
    except QuantineError:
        raise
    except Exception as error:  # damage shows in many places inside transformers
        said = cut(error, 200)
        raise FormatError(f"{source.directory} cannot be loaded, it is damaged: {said}") from error
    model, info = loaded
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[kind]:
            raise FormatError(
                f"{source.directory} is damaged: {kind.replace('_', ' ')} {cut(sorted(info[kind]))}"
            )
    if arithmetic is not None:
        for _, module in packed_modules(model):
            module.arithmetic = arithmetic
    packed: PreTrainedModel = model.eval().to(where)
    return packed


def load_model(
    source: ModelSource, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load the model of ``source``, quantized or not, to compute in ``dtype`` on ``device``.

    Raises:
        BackendUnavailable: there is no such device.
        CheckpointError, FormatError: the model cannot be read.
    """
    where = device_named(device)
    if source.is_quantized():
        return load_packed(source, dtype, device=where)
    loaded: Any = source.float_model(dtype)
    model: PreTrainedModel = loaded.to(where)
    return model
