"""Each class is tried in a process of its own, and the table in docs/ says what comes out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantine.errors import PlanError
from quantine.runtime.decoder import Decoder, decoder_for
from quantine.runtime.decoder_structures import STRUCTURES
from quantine.survey import survey as module
from quantine.survey import verdict
from quantine.survey.survey import causal_classes, chosen_classes, survey
from quantine.survey.verdict import NOT_ROUNDED, UNBUILT, Verdict, examine

TABLE = Path(__file__).parents[2] / "docs" / "families.json"
SAMPLE = ("ArceeForCausalLM", "CTRLLMHeadModel", "GPTJForCausalLM", "XLNetLMHeadModel")
"""Classes that are tried in every run of the tests."""


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, object]]:
    """The rows of docs/families.json by class."""
    return {row["class"]: row for row in json.loads(TABLE.read_text(encoding="utf-8"))}


def test_the_table_has_every_class_of_the_installed_transformers(
    table: dict[str, dict[str, object]],
) -> None:
    assert list(table) == list(causal_classes())
    for row in table.values():
        assert list(row) == ["class", "weights", "activations", "native", "reason"]
        full = row["weights"] and row["activations"] and row["native"]
        assert bool(row["reason"]) != full or NOT_ROUNDED in str(row["reason"])
    native = {name for name, kind in causal_classes().items() if kind in STRUCTURES}
    assert {name for name, row in table.items() if row["native"]} == native


@pytest.mark.parametrize("class_name", SAMPLE)
def test_the_table_says_what_comes_out(
    class_name: str, table: dict[str, dict[str, object]]
) -> None:
    assert examine(class_name, causal_classes()[class_name]).as_dict() == table[class_name]


@pytest.mark.slow
def test_a_process_tries_a_class() -> None:
    (found,) = survey(chosen_classes(["LlamaForCausalLM"]))
    assert found == Verdict("LlamaForCausalLM", weights=True, activations=True, native=True)


def test_classes_are_chosen_by_their_name_or_model_type() -> None:
    assert chosen_classes([]) == causal_classes()
    assert chosen_classes(["llama", "GPT2LMHeadModel"]) == {
        "GPT2LMHeadModel": "gpt2",
        "LlamaForCausalLM": "llama",
    }
    with pytest.raises(PlanError, match="no causal language model 'lama'"):
        chosen_classes(["llama", "lama"])


def test_a_native_decoder_that_computes_something_else_is_none(
    packed: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(model: Any, capacity: int) -> Decoder:
        model.model.layers[1].self_attn.scaling *= 1.5
        return decoder_for(model, capacity)

    verdict._decode(packed("llama", "rtn"))
    monkeypatch.setattr(verdict, "decoder_for", off)
    with pytest.raises(verdict.Unlike, match=r"logits of the native decoder are off by \d"):
        verdict._decode(packed("llama", "rtn"))


def test_a_class_that_cannot_be_built_says_so() -> None:
    assert examine("Odd", "no such type").reason.startswith(UNBUILT)


@pytest.mark.slow
def test_a_class_that_takes_too_long_or_ends_its_process_does_not_end_the_survey(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SECONDS", 20)
    monkeypatch.setattr(module, "_examine", _misbehave)
    found = list(survey({"Dead": "die", "Slow": "sleep", "Fine": "answer"}))
    assert [one.reason for one in found] == [
        "its process ended without a result",
        "it takes more than 20 seconds",
        "fine",
    ]


def _misbehave(pipe: object, class_name: str, model_type: str) -> None:
    if model_type == "die":
        os._exit(3)
    if model_type == "sleep":
        time.sleep(1000)
    pipe.send(Verdict(class_name, reason="fine"))  # type: ignore[attr-defined]
