"""What quantine can do with one architecture, tried on a small random model of it."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from quantine.activations.attention import NAME as ATTENTION
from quantine.activations.install import rebuild_block
from quantine.activations.linked import linked_family
from quantine.calibrate.segments import Calibration
from quantine.core.ambient import own_state
from quantine.errors import BackendUnavailable, QuantineError, cut
from quantine.families.experts import Piece, experts_in, separate
from quantine.families.layers import block_list, is_transposed
from quantine.plan.plan import Plan
from quantine.run.left_alone import left_lines
from quantine.run.quantize import quantize
from quantine.runtime.decoder import decoder_for
from quantine.runtime.load import load
from quantine.runtime.packed import packed_modules
from quantine.survey.specimen import TEXT, specimen_config, write_specimen

if TYPE_CHECKING:
    from transformers import PretrainedConfig

METHODS: Final = ("rtn", "gptq", "spqr")
"""Methods that are tried."""
ROUNDED: Final = Plan.scheme("W4A8", method="rtn", group_size=16)
"""A plan that rounds activations, keys and values among them."""
NOT_ROUNDED: Final = "not rounded: "
"""How the reason goes on where some activations are rounded, and others are not."""
SHAPE: Final = (2, 24)
"""Sequences, and tokens of each, whose logits are compared."""
CLOSE: Final = 5e-4
"""Largest difference of logits that sums in float32 explain in dozens of blocks, as a share of the
largest logit."""
NEAR: Final = 0.1
"""The same where activations are rounded, some of which such sums bring to the next code: 0.03 in
models of random weights. A matrix whose inputs have another order changes logits by half of all."""
UNBUILT: Final = "no small model can be built"
"""How the reason begins where transformers itself cannot build a small model."""


@dataclass(frozen=True)
class Verdict:
    """What can be done with the models of a class in transformers.

    Attributes:
        class_name: name of the class.
        weights: whether a small model of it, quantized by each of `METHODS`, saved and loaded,
            gives the logits of the float model with the dequantized weights.
        activations: whether activations can be rounded: saved and loaded, such a model gives the
            logits of the float model with its weights, orders and grids. The reason says which are
            left alone.
        native: whether the native decoder gives the logits of the first of these models.
        reason: why what is false is so, and what is left alone; empty where all is true.
    """

    class_name: str
    weights: bool = False
    activations: bool = False
    native: bool = False
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """All attributes by name; that of the class is ``class``."""
        fields = asdict(self)
        return {"class": fields.pop("class_name"), **fields}


class Unlike(Exception):
    """Logits of a quantized model are not those of its dequantized weights."""


@own_state()
def examine(class_name: str, model_type: str) -> Verdict:
    """Try what can be done with the models of a class.

    Args:
        class_name: name of the class in transformers.
        model_type: one of its model types.
    """
    verdict = Verdict(class_name)
    try:
        config = specimen_config(model_type)
    except Exception as error:  # whatever a configuration raises without its required fields
        return replace(verdict, reason=f"{UNBUILT}: {cut(repr(error), 240)}")
    with tempfile.TemporaryDirectory() as scratch:
        found = _examined(verdict, config, Path(scratch))
    return replace(found, reason=found.reason.replace(f"{scratch}/", ""))


def _examined(verdict: Verdict, config: PretrainedConfig, scratch: Path) -> Verdict:
    source = scratch / "float"
    try:
        write_specimen(config, source)
    except Exception as error:  # the same, where the model is built
        return replace(verdict, reason=f"{UNBUILT}: {cut(repr(error), 240)}")
    text = scratch / "text.txt"
    text.write_text(TEXT * 50, encoding="utf-8")
    calibration = Calibration(str(text), samples=2, seqlen=32)
    reasons = []
    try:
        for method in METHODS:
            out = scratch / method
            quantize(source, out, Plan.preset(method, bits=4, group_size=16), calibration)
            _compare(source, out)
        verdict = replace(verdict, weights=True)
    except (QuantineError, Unlike) as error:
        return replace(verdict, reason=str(error))
    except Exception as error:  # a fault of quantine, or what an architecture raises when it runs
        return replace(verdict, reason=f"weights: {cut(repr(error), 150)}")
    try:
        result = quantize(source, scratch / "rounded", ROUNDED, calibration)
        _compare_rounded(source, result.path)
        verdict = replace(verdict, activations=True)
        reasons += [NOT_ROUNDED + line for line in left_lines(result.report.get("left", ()))]
    except (QuantineError, Unlike) as error:
        reasons.append(str(error))
    except Exception as error:  # as above
        reasons.append(f"activations: {cut(repr(error), 150)}")
    try:
        _decode(scratch / METHODS[0])
        verdict = replace(verdict, native=True)
    except (BackendUnavailable, Unlike) as error:
        reasons.append(str(error))
    return replace(verdict, reason="; ".join(reasons))


def _compare(source: Path, out: Path) -> None:
    """Check that a quantized model computes with what its packed matrices hold.

    Raises:
        Unlike: it does not.
    """
    from transformers import AutoModelForCausalLM

    packed, _ = load(out, arithmetic="exact")
    plain: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    as_float = _logits(plain)
    pieces = _pieces(packed)
    for name, module in packed_modules(packed):
        if f"{name}.weight" in pieces:
            fused, piece = pieces[f"{name}.weight"]
            piece.of(plain.get_parameter(fused).data[piece.expert]).copy_(module.dequantize())
        else:
            _put(plain.get_submodule(name), module.dequantize())
    expected, found = _logits(plain), _logits(packed)
    _check_equal(found, expected, "the loaded model")
    if torch.equal(expected, as_float):
        raise Unlike("quantized matrices have no part in the logits")


def _compare_rounded(source: Path, out: Path) -> None:
    """Check that a model whose activations are rounded computes as its files say.

    Raises:
        Unlike: it computes something else.
    """
    from transformers import AutoModelForCausalLM

    packed, _ = load(out, arithmetic="exact")
    plain: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    as_float = _logits(plain)
    separate(plain)
    family = linked_family(plain.config)
    tensors, modules = dict(packed.state_dict()), dict(packed_modules(packed))
    assert ROUNDED.activations is not None
    if family.attends:
        plain.set_attn_implementation(ATTENTION)
    for index, block in enumerate(block_list(plain, family)):
        path, own = f"{family.blocks}.{index}", family.in_block(index)
        rebuild_block(block, path, own, ROUNDED.activations, tensors.get)
    for name, tensor in plain.state_dict().items():
        if name in tensors:
            tensor.copy_(tensors[name])
    for name, module in modules.items():
        _put(plain.get_submodule(name), module.dequantize())
    expected = _logits(plain)
    _check_equal(_logits(packed), expected, "the model with rounded activations", NEAR)
    if torch.equal(expected, as_float):
        raise Unlike("quantized matrices have no part in the logits")


def _decode(out: Path) -> None:
    """Check that the native decoder computes what the modules of a quantized model compute.

    Raises:
        BackendUnavailable: it does not decode such models.
        Unlike: it computes something else.
    """
    packed, _ = load(out, arithmetic="exact")
    logits = _logits(packed)
    decoder = decoder_for(packed, SHAPE[1])
    for tokens, expected in zip(_tokens(), logits, strict=True):
        decoder.reset()
        prompt, *steps = tokens.split([SHAPE[1] - 2, 1, 1])
        found = [decoder.append(part).clone() for part in (prompt, *steps)]
        _check_equal(torch.stack(found), expected[-3:], "the native decoder")


def _check_equal(found: Tensor, expected: Tensor, what: str, most: float = CLOSE) -> None:
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= most * largest:
        raise Unlike(f"logits of {what} are off by {difference / largest:.1e}")


def _pieces(model: nn.Module) -> dict[str, tuple[str, Piece]]:
    """Where the matrices of experts are in transformers' own model: parameter and part, by name."""
    return {
        f"{path}.{name}": (f"{path}.{piece.parameter}", piece)
        for path, experts in experts_in(model).items()
        for name, piece in experts.pieces()
    }


def _put(module: nn.Module, weight: Tensor) -> None:
    stored: Any = module.weight
    stored.data.copy_(weight.T if is_transposed(module) else weight)


def _logits(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=_tokens(), use_cache=False).logits.detach()
    return logits.clone()


def _tokens() -> Tensor:
    generator = torch.Generator("cpu").manual_seed(1)
    return torch.randint(5, 200, SHAPE, generator=generator, dtype=torch.int64, device="cpu")
