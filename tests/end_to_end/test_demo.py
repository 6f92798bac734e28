"""The demo model, as a user would do it: quantize, evaluate, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantine import cli
from quantine.runtime.load import load_model
from quantine.source.locate import locate

pytestmark = pytest.mark.slow

EVALUATION = ["--window", "256", "--limit", "2", "--quiet"]
SHORT = ["--samples", "8", "--seqlen", "128"]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Numbers of the float model and of four quantized ones on held-out built-in text."""
    root = tmp_path_factory.mktemp("demo")
    source = locate("demo")
    converted = root / "float"  # the same weights, which read faster than the GGUF file
    load_model(source, torch.float32).save_pretrained(converted)
    source.tokenizer().save_pretrained(converted)
    requests = {
        "rtn4": ["demo", "--method", "rtn", "--bits", "4", "--samples", "0"],
        "rtn3": [str(converted), "--method", "rtn", "--bits", "3", "--samples", "0"],
        "gptq3": [str(converted), "--method", "gptq", "--bits", "3", *SHORT],
        "spqr3": [str(converted), "--method", "spqr", "--bits", "3", *SHORT],
    }
    for name, (model, *request) in requests.items():
        assert cli.main(["quantize", model, str(root / name), *request, "--quiet"]) == 0
    found = {}
    for name in ("float", *requests):
        path = root / f"{name}.json"
        against = ["--reference", str(converted), "--cache", str(root / "cache")]
        reference = [] if name == "float" else against
        evaluation = [*EVALUATION, *reference, "--json", str(path)]
        assert cli.main(["eval", str(root / name), *evaluation]) == 0
        scores = json.loads(path.read_text())
        found[name] = {**scores, **scores["texts"]["builtin"]}
    return found


def test_perplexity_rises_as_bits_fall_and_calibration_holds_it_down(
    scores: dict[str, dict[str, Any]],
) -> None:
    perplexity = {name: value["perplexity"] for name, value in scores.items()}
    assert perplexity["float"] < perplexity["rtn4"] < 1.5 * perplexity["float"]
    assert perplexity["rtn4"] < perplexity["gptq3"] < perplexity["rtn3"]
    assert perplexity["gptq3"] < 2 * perplexity["float"]
    assert perplexity["spqr3"] < perplexity["gptq3"]
    kl = {name: scores[name]["kl"] for name in ("rtn4", "spqr3", "gptq3", "rtn3")}
    assert 0 < kl["spqr3"] < kl["gptq3"]
    assert 0 < kl["rtn4"] < kl["gptq3"] < kl["rtn3"]
    top1 = {name: scores[name]["top1"] for name in kl}
    assert 1 > top1["rtn4"] > top1["gptq3"] > top1["rtn3"] > 0.3


def test_bits_are_those_of_groups_of_64(scores: dict[str, dict[str, Any]]) -> None:
    assert scores["rtn4"]["bits_per_weight"] == 4 + (16 + 4) / 64 == 4.3125
    assert scores["rtn3"]["bits_per_weight"] == 3 + (16 + 3) / 64 == 3.296875
    assert scores["gptq3"]["bits_per_weight"] == 3.296875
    assert scores["gptq3"]["model_bytes"] < scores["rtn4"]["model_bytes"]


def test_the_same_tokens_were_scored(scores: dict[str, dict[str, Any]]) -> None:
    assert {value["tokens"] for value in scores.values()} == {2 * 255}


def test_a_half_downloaded_gguf_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = locate("demo")
    assert source.gguf_file is not None
    whole = (source.directory / source.gguf_file).read_bytes()
    for share in (2000, len(whole) // 2):
        (tmp_path / "half.gguf").write_bytes(whole[:share])
        command = ["quantize", str(tmp_path / "half.gguf"), str(tmp_path / "out"), "--samples", "0"]
        assert cli.main([*command, "--method", "rtn", "--quiet"]) == 2
        said = capsys.readouterr().err
        assert "half.gguf" in said
        assert "Traceback" not in said
