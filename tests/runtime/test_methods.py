"""Copies of loaded models, and what transformers' own methods do to packed ones."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn

from quantine import Calibration, Plan, load, quantize
from quantine.errors import FormatError
from quantine.runtime.load import load_packed
from quantine.runtime.modules import QuantEmbedding, TiedHead
from quantine.source.locate import locate
from tiny_models import logits_of, some_tokens

Packed = Callable[[str, str], Path]
Tiny = Callable[[str], Path]

ASKED: Final = {"max_new_tokens": 4, "do_sample": False}


def made(model: Any) -> Tensor:
    model.generation_config.eos_token_id = None
    tokens: Tensor = model.generate(some_tokens(6, 1), **ASKED)
    return tokens


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: Final[dict[str, Callable[[Any], Any]]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
}


@pytest.fixture(scope="session")
def tables(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model with a packed embedding and head."""
    root = tmp_path_factory.mktemp("tables")

    def directory(name: str) -> Path:
        if not (root / name).exists():
            plan = Plan.preset("rtn", group_size=32, arithmetic="exact").with_head(8)
            quantize(tiny(name), root / name, plan, Calibration(samples=0))
        return root / name

    return directory


@pytest.fixture(scope="session")
def rounding(tiny: Tiny, short: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that rounds activations."""
    out = tmp_path_factory.mktemp("rounding") / "out"
    quantize(tiny("opt"), out, Plan.scheme("W4A8", arithmetic="exact"), short)
    return out


@pytest.fixture(scope="session")
def outliers(tiny: Tiny, short: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model some of whose matrices have outliers, and some none: empty tensors."""
    out = tmp_path_factory.mktemp("outliers") / "out"
    quantize(tiny("llama"), out, Plan.preset("spqr", bits=4, arithmetic="exact"), short)
    return out


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", ["rtn", "mixed", "tables", "rounding", "outliers"])
def test_copies_are_whole_and_on_their_own(
    kind: str,
    warm: bool,
    way: str,
    packed: Packed,
    tables: Callable[[str], Path],
    rounding: Path,
    outliers: Path,
    tmp_path: Path,
) -> None:
    directories: dict[str, Callable[[], Path]] = {
        "rounding": lambda: rounding,
        "outliers": lambda: outliers,
        "tables": lambda: tables("llama_tied"),
    }
    directory = directories.get(kind, lambda: packed("llama", kind))()
    model = load(directory, dtype=torch.float32)[0]
    if warm:
        made(model)
    twin = COPIES[way](model)
    assert torch.equal(logits_of(twin), logits_of(model))
    assert torch.equal(made(twin), made(model))
    if kind != "rounding":
        assert twin.generate._kept is not None
        assert twin.generate._kept is not model.generate._kept
    before = made(model)
    with torch.no_grad():
        next(twin.parameters()).mul_(-1.5)
    assert torch.equal(made(twin), type(twin).generate(twin, some_tokens(6, 1), **ASKED))
    assert torch.equal(made(model), before)
    twin.save_pretrained(tmp_path / "again")
    again = load_packed(locate(tmp_path / "again"), dtype=torch.float32)
    assert torch.equal(logits_of(again), logits_of(twin))


def test_a_state_dict_can_be_saved_and_loaded(outliers: Path) -> None:
    model = load(outliers, dtype=torch.float32)[0]
    assert any(tensor.numel() == 0 for tensor in model.state_dict().values())
    state = saved(model.state_dict())
    twin = load(outliers, dtype=torch.float32)[0]
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            if tensor.is_floating_point():
                tensor.zero_()
    made(twin)
    assert not twin.load_state_dict(state).missing_keys
    assert torch.equal(made(twin), made(model))


@pytest.mark.slow
def test_another_process_loads_pickles(packed: Packed, rounding: Path, tmp_path: Path) -> None:
    wanted = []
    for directory in (packed("llama", "rtn"), rounding):
        model = load(directory, torch.float32)[0]
        wanted.append(str(made(model)[0].tolist()))
        (tmp_path / directory.name).write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch\n"
        "torch.set_num_threads(1)\n"
        f"tokens = torch.tensor({some_tokens(6, 1).tolist()})\n"
        "for name in sys.argv[1:]:\n"
        "    model = pickle.load(open(name, 'rb'))\n"
        "    print(model.generate(tokens, max_new_tokens=4, do_sample=False)[0].tolist())"
    )
    command = [sys.executable, "-c", code, *map(str, sorted(tmp_path.iterdir()))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sorted(run.stdout.splitlines()) == sorted(wanted)


def test_float_tables_are_resized_and_stay_tied(packed: Packed) -> None:
    for name in ("llama", "qwen2"):
        model = load(packed(name, "rtn"), dtype=torch.float32)[0]
        before = logits_of(model)
        made(model)
        model.resize_token_embeddings(310, mean_resizing=False)
        assert torch.allclose(logits_of(model)[..., :300], before, atol=1e-5)
        assert made(model).shape == (1, 10)
        assert model.generate._kept is not None
        tied = model.lm_head.weight is model.get_input_embeddings().weight
        assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_packed_tables_are_not_resized_but_stay(name: str, tables: Callable[[str], Path]) -> None:
    model = load(tables(name), dtype=torch.float32)[0]
    before, tokens = logits_of(model), made(model)
    for options in ({"new_num_tokens": 310}, {"pad_to_multiple_of": 64}):
        with pytest.raises(FormatError, match="resize the float model and quantize it again"):
            model.resize_token_embeddings(**options)
    assert isinstance(model.resize_token_embeddings(), QuantEmbedding)
    model.tie_weights()
    assert torch.equal(logits_of(model), before)
    assert torch.equal(made(model), tokens)
    assert set(model.state_dict()) == set(load(tables(name))[0].state_dict())


def test_a_replaced_embedding_unties_with_a_word(tables: Callable[[str], Path]) -> None:
    model = load(tables("llama_tied"), dtype=torch.float32)[0]
    assert isinstance(model.lm_head, TiedHead)
    made(model)
    model.set_input_embeddings(nn.Embedding(300, 64).eval())
    wanted = type(model).generate(model, some_tokens(6, 1), **ASKED)
    assert torch.equal(made(model), wanted)
    with pytest.raises(FormatError, match="set_output_embeddings"):
        model.tie_weights()
    model.set_output_embeddings(nn.Linear(64, 300, bias=False).eval())
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    wanted = type(model).generate(model, some_tokens(6, 1), **ASKED)
    assert torch.equal(made(model), wanted)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_other_dtypes_and_checkpointing(packed: Packed) -> None:
    model = load(packed("llama", "rtn"), dtype=torch.float32)[0]
    tokens = made(model)
    model.to(torch.bfloat16).to(torch.float32)
    assert made(model).shape == tokens.shape
    assert model.generate._kept is not None
    model.gradient_checkpointing_enable()
    wanted = type(model).generate(model, some_tokens(6, 1), **ASKED)
    assert torch.equal(made(model), wanted)
    model.gradient_checkpointing_disable()
    assert torch.equal(made(model), wanted)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_that_rounds_is_not_exchanged(rounding: Path, name: str) -> None:
    model, _ = load(rounding)
    before = made(model)
    with pytest.raises(FormatError, match=name):
        model.set_attn_implementation(name)
    assert torch.equal(made(model), before)


def test_attention_that_does_not_round_may_be_exchanged(packed: Packed) -> None:
    model, _ = load(packed("llama", "gptq"))
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
