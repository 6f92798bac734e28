"""Models on a device that refuses tensors of the CPU: loaded, evaluated, continued."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantine
from other_device import (
    NAME,
    OtherDevice,
    StrayTensor,
    no_extension,
    untouched_extension,
    without_float64,
)
from quantine import Calibration, Plan, quantize
from quantine.errors import BackendUnavailable
from quantine.eval.evaluate import evaluate
from quantine.runtime.decoder import decoder_for
from quantine.runtime.generate import stream
from quantine.runtime.kv_cache import packed_cache
from quantine.runtime.load import load_model
from quantine.runtime.modules import QuantEmbedding, QuantLinear, TiedHead
from quantine.runtime.packed import packed_modules
from quantine.source.locate import locate
from tiny_models import logits_of, some_tokens

Tiny = Callable[[str], Path]
Packed = Callable[[str, str], Path]
UNKNOWN = "nosuch"


@contextmanager
def there() -> Iterator[None]:
    """The other device can be used, and native code cannot."""
    with OtherDevice(), untouched_extension():
        yield


def logits_at(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens.to(model.device)).logits
    return logits


@pytest.mark.parametrize(
    "used",
    [
        lambda path: quantine.load(path, device=UNKNOWN),
        lambda path: evaluate(path, device=UNKNOWN),
        lambda path: load_model(locate(path), torch.float32, UNKNOWN),
        lambda path: continued(path, UNKNOWN),
        lambda path: quantize(path, path.with_name("out"), device=UNKNOWN),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_weights_are_read(
    used: Callable[[Path], Any], packed: Packed, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    for file in packed("llama", "rtn").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BackendUnavailable, match="no device 'nosuch' here"):
        used(tmp_path / "model")


def test_the_cpu_is_the_default(packed: Packed, tiny: Tiny, text_file: Path) -> None:
    out, tokens = packed("llama", "rtn"), some_tokens(9, 2)
    plain, named = quantine.load(out)[0], quantine.load(out, device="cpu")[0]
    assert torch.equal(logits_of(plain, tokens), logits_of(named, tokens))
    assert next(iter(packed_modules(named)))[1].matrix() is not None
    options: dict[str, Any] = {"window": 32, "limit": 2, "reference": tiny("llama")}
    measured = [
        evaluate(out, str(text_file), **options),
        evaluate(out, str(text_file), **options, device="cpu"),
    ]
    for one in measured:
        one["texts"]["text.txt"].pop("seconds")
    assert measured[0] == measured[1]
    assert continued(out, "cpu")[0] == continued(out, None)[0]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "opt", "gemma3"])
def test_a_loaded_model_computes_there_what_references_do_here(name: str, packed: Packed) -> None:
    tokens, out = some_tokens(9, 2), packed(name, "rtn")
    with no_extension():
        expected = logits_of(quantine.load(out)[0], tokens)
    with there():
        model, _ = quantine.load(out, device=NAME)
        found = logits_at(model, tokens)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {NAME}
    assert found.device.type == NAME
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_packed_modules_elsewhere_have_no_native_matrix(tiny: Tiny, tmp_path: Path) -> None:
    rules = [
        {"match": match, "method": "rtn", "bits": 8, "group_size": 32}
        for match in ("@blocks", "@embedding")
    ]
    plan = Plan.from_dict({"rules": rules})
    quantize(tiny("llama_tied"), tmp_path / "out", plan, Calibration(samples=0))
    with there():
        model, _ = quantine.load(tmp_path / "out", device=NAME)
        assert logits_at(model, some_tokens(9, 2)).device.type == NAME
        kinds = set()
        for _, module in packed_modules(model):
            kinds.add(type(module))
            assert module.matrix() is None
            x = torch.randn(80, module.in_features).to(NAME)
            expected = x.cpu() @ module.dequantize().cpu().T
            found = module.product(x).cpu()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert kinds == {QuantEmbedding, QuantLinear}
    assert any(isinstance(module, TiedHead) for module in model.modules())
    with pytest.raises(BackendUnavailable, match="not on the CPU, but on other:0"):
        decoder_for(model, 8)


def continued(model: Path, device: str | None) -> tuple[str, str]:
    """What `stream` writes, and what it logs."""
    out, log = io.StringIO(), io.StringIO()
    options: dict[str, Any] = {} if device is None else {"device": device}
    stream(
        model,
        ["Line 3"],
        tokens=6,
        chat=False,
        temperature=0.7,
        seed=3,
        dtype=torch.float32,
        out=out,
        log=log,
        **options,
    )
    return out.getvalue(), log.getvalue()


def test_text_is_continued_there_without_the_native_decoder(packed: Packed) -> None:
    out = packed("llama", "rtn")
    with there():
        written, log = continued(out, NAME)
    assert "decoding with the modules of transformers: " in log
    assert "the model is not on the CPU, but on other:0" in log
    with no_extension():
        assert continued(out, "cpu")[0] == written


def test_generate_of_transformers_works_there(
    packed: Packed, caplog: pytest.LogCaptureFixture
) -> None:
    ids, out = some_tokens(5, 1), packed("llama", "rtn")
    with there(), caplog.at_level(logging.WARNING, "quantine"):
        model, _ = quantine.load(out, torch.float32, device=NAME)
        made = model.generate(ids.to(NAME), max_new_tokens=4, do_sample=False)
    assert "not on the CPU" in caplog.text
    with no_extension():
        here = quantine.load(out, torch.float32)[0]
        wanted = here.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(made.cpu(), wanted)


def test_a_model_and_its_reference_are_compared_there(
    packed: Packed, tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    out = packed("llama", "rtn")

    def measured(device: str, cache: Path | None) -> dict[str, Any]:
        return evaluate(
            out,
            str(text_file),
            window=32,
            limit=2,
            reference=tiny("llama"),
            cache=cache,
            device=device,
        )["texts"]["text.txt"]

    with no_extension():
        expected = measured("cpu", None)
    for cache in (None, tmp_path, tmp_path):  # the last one reads what was kept
        with there():
            found = measured(NAME, cache)
        for name in ("perplexity", "kl", "top1", "reference_perplexity", "recovery"):
            assert found[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-4), name
    with no_extension():
        measured("cpu", tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize("scheme", ["W4A8", "W4A4KV"])
def test_rounded_activations_and_packed_caches_work_there(
    scheme: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    quantize(tiny("llama"), tmp_path / "out", Plan.scheme(scheme), short)
    tokens = some_tokens(30, 1)

    def run(device: str) -> list[Tensor]:
        model, _ = quantine.load(tmp_path / "out", torch.float32, device=device)
        cache, found = packed_cache(model), []
        assert cache is not None
        for part in (tokens[:, :24], tokens[:, 24:]):
            with torch.no_grad():
                output = model(input_ids=part.to(model.device), past_key_values=cache)
            found.append(output.logits.cpu())
        assert cache.layers[0].keys.device.type == device
        cache.crop(-10)
        return [*found, cache.layers[0].keys.cpu()]

    with no_extension():
        expected = run("cpu")
    with there():
        found = run(NAME)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other.float(), one.float(), rtol=1e-4, atol=1e-4)


def test_moving_a_model_changes_no_packed_dtype(packed: Packed) -> None:
    model: nn.Module = quantine.load(packed("llama", "rtn"))[0]
    before = {name: tensor.dtype for name, tensor in model.named_buffers()}
    with there():
        model.to(NAME)
    assert {name: tensor.dtype for name, tensor in model.named_buffers()} == before


def test_a_device_without_float64_loads_continues_and_evaluates(
    packed: Packed, tiny: Tiny, text_file: Path
) -> None:
    out = packed("llama", "rtn")
    options: dict[str, Any] = {"window": 32, "limit": 2, "reference": tiny("llama")}
    with no_extension():
        expected = evaluate(out, str(text_file), **options)["texts"]["text.txt"]
        text, _ = continued(out, "cpu")
    with there(), without_float64():
        with pytest.raises(StrayTensor, match="float64"):
            torch.ones(2).to(NAME).double()
        found = evaluate(out, str(text_file), **options, device=NAME)["texts"]["text.txt"]
        assert continued(out, NAME)[0] == text
    for name in ("perplexity", "kl", "top1"):
        assert found[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-4), name
