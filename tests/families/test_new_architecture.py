"""An architecture of which nobody has heard is quantized as it is, without a word about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import quantine
from quantine.activations.linked import UNPROVED, linked_family
from quantine.errors import FamilyError
from quantine.families import family_of
from quantine.families.derivation.small import small_config
from quantine.families.family import Link
from quantine.formats.finished import FinishedDirectory
from quantine.runtime.packed import packed_modules
from quantine.survey.verdict import ROUNDED, _compare_rounded
from tiny_models import build, logits_of, with_weights


class StromConfig(PretrainedConfig):
    """Sizes have names of their own, of which transformers is told only what it has to know."""

    model_type = "strom"

    def __init__(self, breite: int = 64, tiefe: int = 3, koepfe: int = 4, **rest: Any) -> None:
        self.breite, self.tiefe, self.koepfe = breite, tiefe, koepfe
        self.vocab_size = rest.pop("vocab_size", 300)
        super().__init__(**rest)


class Blick(nn.Module):
    """Attention whose keys are its values, and whose queries share a matrix with the gate."""

    def __init__(self, config: StromConfig) -> None:
        super().__init__()
        self.koepfe = config.koepfe
        self.frage_und_tor = nn.Linear(config.breite, 2 * config.breite)
        self.antwort = nn.Linear(config.breite, config.breite, bias=False)
        self.heraus = nn.Linear(config.breite, config.breite)

    def forward(self, x: Tensor) -> Tensor:
        frage, tor = self.frage_und_tor(x).chunk(2, -1)
        shape = (*x.shape[:2], self.koepfe, -1)
        q, kv = frage.view(shape).transpose(1, 2), self.antwort(x).view(shape).transpose(1, 2)
        found = nn.functional.scaled_dot_product_attention(q, kv, kv, is_causal=True)
        return self.heraus(found.transpose(1, 2).reshape(x.shape) * tor.sigmoid())


class Glied(nn.Module):
    """Attention and an MLP side by side, on one input; every second block has no attention."""

    def __init__(self, config: StromConfig, nummer: int) -> None:
        super().__init__()
        self.eben = nn.LayerNorm(config.breite)
        self.blick = Blick(config) if nummer % 2 == 0 else None
        self.auf = nn.Linear(config.breite, 96)
        self.ab = nn.Linear(96, config.breite, bias=False)
        self.mischung = nn.Parameter(torch.ones(2, config.breite))

    def forward(self, strom: Tensor) -> tuple[Tensor, str]:
        x = self.eben(strom)
        seen = 0 if self.blick is None else self.blick(x) * self.mischung[0]
        return strom + seen + self.ab(self.auf(x).relu()) * self.mischung[1], "done"


class StromModel(PreTrainedModel):
    config_class = StromConfig
    base_model_prefix = "fluss"

    def __init__(self, config: StromConfig) -> None:
        super().__init__(config)
        self.woerter = nn.Embedding(config.vocab_size, config.breite)
        self.kette = nn.ModuleList(Glied(config, n) for n in range(config.tiefe))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.woerter

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        strom = self.woerter(input_ids)
        for glied in self.kette:
            strom, _done = glied(strom=strom)
        return BaseModelOutput(last_hidden_state=strom)


class StromForCausalLM(PreTrainedModel):
    config_class = StromConfig
    base_model_prefix = "fluss"
    _tied_weights_keys = {"wahl.weight": "fluss.woerter.weight"}  # noqa: RUF012

    def __init__(self, config: StromConfig) -> None:
        super().__init__(config)
        self.fluss = StromModel(config)
        self.wahl = nn.Linear(config.breite, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.fluss.woerter

    def get_output_embeddings(self) -> nn.Module:
        return self.wahl

    def forward(self, input_ids: Tensor, **rest: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.wahl(self.fluss(input_ids).last_hidden_state))


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    AutoConfig.register("strom", StromConfig)
    AutoModelForCausalLM.register(StromConfig, StromForCausalLM)
    yield
    del CONFIG_MAPPING._extra_content["strom"]
    del MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[StromConfig]


def test_what_is_where_is_found() -> None:
    family = family_of(StromConfig())
    attention = (("blick.frage_und_tor", "blick.antwort"), ("blick.heraus",))
    assert family.groups_in(0) == (*attention, ("auf",), ("ab",))
    assert family.groups_in(1) == (("auf",), ("ab",))
    assert (family.blocks, family.embedding, family.head) == (
        "fluss.kette",
        "fluss.woerter",
        "wahl",
    )
    assert dict(family.kept) == {"mischung": "no matrix of a product"}
    assert (family.outputs, family.fixed) == (2, ())


def test_its_reorders_are_found_and_proved() -> None:
    family = linked_family(StromConfig())
    readers = ("blick.frage_und_tor", "blick.antwort", "auf")
    hidden = Link("R5", "weights", ("auf",), ("ab",))
    assert family.in_block(0).links == (Link("R1", "gather", ("eben",), readers), hidden)
    assert family.in_block(1).links == (Link("R4", "gather", ("eben",), ("auf",)), hidden)
    assert family.left == tuple((index, "blick.heraus", UNPROVED) for index in (0, 2))
    assert not family.attends


def test_its_activations_are_rounded(tmp_path: Path, short: quantine.Calibration) -> None:
    source = build(StromConfig(), tmp_path / "model", bos=False)
    result = quantine.quantize(source, tmp_path / "out", ROUNDED, short)
    model, _ = quantine.load(result.path)
    rounded = {name for name, m in packed_modules(model) if getattr(m, "inputs", None) is not None}
    assert {name.rpartition(".")[2] for name in rounded} == {
        *("frage_und_tor", "antwort", "auf", "ab")
    }
    _compare_rounded(source, result.path)
    assert {one["name"] for one in result.report["left"]} == {
        *(f"fluss.kette.{index}.blick.heraus" for index in (0, 2)),
        *(f"fluss.kette.{index}" for index in range(3)),
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["rtn", "gptq", "spqr"])
def test_it_is_quantized_and_loaded(
    method: str, tied: bool, tmp_path: Path, short: quantine.Calibration
) -> None:
    source = build(StromConfig(tie_word_embeddings=tied), tmp_path / "model", bos=False)
    table = {"method": "rtn", "bits": 8, "group_size": 16}
    plan = quantine.Plan.from_dict(
        {
            "arithmetic": "exact",
            "rules": [
                {"match": "@embedding", **table},
                {"match": "@head", **table},
                {"match": "@blocks", "method": method, "bits": 4, "group_size": 16},
            ],
        }
    )
    result = quantine.quantize(source, tmp_path / "out", plan, short)
    model, _ = quantine.load(result.path)
    weights = {name: module.dequantize() for name, module in packed_modules(model)}
    assert len(weights) == 5 + 2 + 5 + (1 if tied else 2)
    if tied:
        weights["wahl"] = weights["fluss.woerter"]
    expected = logits_of(with_weights(source, weights))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits_of(with_weights(source, {}))).abs().mean() > 0.01
    kept = {entry["name"]: entry["reason"] for entry in result.report["kept"]}
    assert kept["fluss.kette.1.mischung"] == "no matrix of a product"


def test_a_budget_is_spent_and_the_directory_read_again(
    tmp_path: Path, short: quantine.Calibration
) -> None:
    source = build(StromConfig(), tmp_path / "model", bos=False)
    choice = {"method": "spqr", "group_size": 16}
    plan = quantine.Plan.from_dict(
        {
            "bits_per_weight": 4.5,
            "choices": [{**choice, "bits": bits} for bits in (2, 3, 4, 5)],
            "rules": [{"match": "@blocks", "method": "search"}],
        }
    )
    out = quantine.quantize(source, tmp_path / "out", plan, short).path
    finished = FinishedDirectory(out)
    model, _ = quantine.load(out)
    modules = dict(packed_modules(model))
    assert len(modules) == len(finished.description.layers) == 12
    for name, module in modules.items():
        assert torch.equal(finished.qtensor(name).dequantize(), module.dequantize())


def test_tables_that_are_read_elsewhere_are_not_quantized(
    tmp_path: Path, short: quantine.Calibration
) -> None:
    config = small_config(AutoConfig.for_model("mamba"), 2)
    source = build(config, tmp_path / "model", bos=False)
    rules = [{"match": "@embedding", "method": "rtn", "bits": 8, "group_size": 16}]
    with pytest.raises(FamilyError, match=r"backbone\.embeddings cannot be quantized: its weight"):
        quantine.quantize(
            source, tmp_path / "out", quantine.Plan.from_dict({"rules": rules}), short
        )
