"""What a quantized directory holds is checked once, when it is loaded, and refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import quantine
from quantine import Calibration, CheckpointError, FormatError, Plan, QuantineError
from tiny_models import WIDTH

Directory = Callable[[str], Path]
NAN, INF = float("nan"), float("inf")
SITES = "model.layers.0.self_attn.sites"
INPUTS = "model.layers.1.mlp.down_proj.inputs"
NORM = "model.layers.1.input_layernorm"
PLANS = {
    "w4a4": ("llama", lambda: Plan.scheme("W4A4")),
    "w8a8": ("llama", lambda: Plan.scheme("W8A8")),
    "opt": ("opt", lambda: Plan.scheme("W4A4")),
    "sparse": ("llama", lambda: Plan.preset("spqr-faithful", format="sparse")),
    "dense": ("llama", lambda: Plan.preset("spqr", bits=3, group_size=16, scale_bits=16)),
    "foreign": ("llama", lambda: Plan.preset("spqr-faithful", format="spqr")),
    "order": ("llama", lambda: Plan.preset("gptq", bits=3, group_size=16, groups="refit")),
    "rtn": ("llama", lambda: Plan.preset("rtn", bits=4, group_size=32)),
}


@pytest.fixture(scope="module")
def made(
    tiny: Callable[[str], Path], short: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Directory:
    root = tmp_path_factory.mktemp("made")

    def directory(name: str) -> Path:
        if not (root / name).exists():
            kind, plan = PLANS[name]
            quantine.quantize(tiny(kind), root / name, plan(), short)
        return root / name

    return directory


@pytest.fixture
def copy(made: Directory, tmp_path: Path) -> Directory:
    """A directory that a test may damage."""
    return lambda name: Path(shutil.copytree(made(name), tmp_path / name))


def with_tensor(directory: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> Path:
    """The directory with another tensor ``name``; the change gets an empty one if there is none."""
    tensors = load_file(directory / "model.safetensors")
    changed = change(tensors.pop(name, torch.empty(0)).clone())
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def with_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def filled(value: float, place: int = 0) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[place] = value
        return tensor

    return change


ROUNDING = [
    ("w4a4", f"{SITES}.query.labels", filled(-1), "labels"),
    ("w4a4", f"{SITES}.key.labels", filled(10**6), "labels"),
    ("w4a4", f"{SITES}.value.labels", lambda t: t[:-1], "labels"),
    ("w4a4", f"{INPUTS}.labels", filled(-1), "labels"),
    ("w4a4", f"{INPUTS}.labels", lambda t: t.float(), "labels"),
    ("w4a4", f"{INPUTS}.labels", lambda t: torch.cat([t, t]), "labels"),
    ("w4a4", f"{INPUTS}.scale", filled(0.0), "scale"),
    ("w4a4", f"{INPUTS}.scale", filled(-1.0), "scale"),
    ("w4a4", f"{INPUTS}.scale", filled(NAN), "scale"),
    ("w4a4", f"{INPUTS}.scale", lambda t: t.half(), "scale"),
    ("w4a4", f"{INPUTS}.scale", lambda t: t[:0], "scale"),
    ("w4a4", f"{INPUTS}.zero", filled(INF), "zero"),
    ("w4a4", f"{INPUTS}.zero", lambda t: t[:-1], "zero"),
    ("w4a4", f"{SITES}.query.feedback", lambda t: torch.zeros(4, 16, 15).half(), "feedback"),
    ("w4a4", f"{SITES}.key.feedback", lambda t: torch.zeros(4, 16, 16).half(), "feedback"),
    ("w4a4", f"{SITES}.value.feedback", lambda t: torch.full((2, 16, 16), INF).half(), "feedback"),
    ("w4a4", f"{INPUTS}.feedback", lambda t: torch.zeros(1, 96, 96).half(), "feedback"),
    ("w8a8", f"{SITES}.key.reach", lambda t: torch.ones(1), "reach"),
    ("w8a8", f"{INPUTS}.reach", lambda t: torch.zeros(1), "reach"),
    ("w8a8", f"{INPUTS}.reach", lambda t: torch.ones(2), "reach"),
    ("w8a8", f"{INPUTS}.zero", filled(256.0), "zero"),
    ("w4a4", f"{INPUTS}.head_reach", lambda t: torch.ones(2), "head_reach"),
    ("w4a4", f"{SITES}.value.head_reach", lambda t: torch.zeros(2), "head_reach"),
    ("w4a4", f"{SITES}.value.head_reach", lambda t: torch.ones(4), "head_reach"),
    ("w4a4", f"{SITES}.key.head_reach", lambda t: torch.ones(2), "head_reach"),
    ("w4a4", f"{SITES}.value.widths", lambda t: torch.full((32,), 4).byte(), "widths"),
    ("w4a4", f"{SITES}.key.widths", lambda t: torch.full((32,), 4), "widths"),
    ("w4a4", f"{SITES}.key.widths", lambda t: torch.full((32,), 3).byte(), "odd numbers of bits"),
    ("w4a4", f"{SITES}.key.widths", lambda t: torch.full((32,), 6).byte(), "96 bits, but .* 64"),
    ("w4a4", f"{SITES}.key.widths", lambda t: torch.full((32,), 10).byte(), "widths"),
    ("w4a4", f"{INPUTS}.widths", lambda t: torch.full((32,), 4).byte(), "widths"),
    ("w4a4", f"{NORM}.order", filled(WIDTH), "order"),
    ("w4a4", f"{NORM}.order", filled(-1), "order"),
    ("w4a4", f"{NORM}.order", lambda t: torch.zeros_like(t), "order"),
    ("w4a4", f"{NORM}.order", lambda t: t[:-1], "order"),
    ("w4a4", f"{NORM}.order", lambda t: t.float(), "order"),
    ("opt", "model.decoder.layers.2.final_layer_norm.order", filled(WIDTH), "order"),
]
DOWN, QUERY = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"
WEIGHTS = [
    ("rtn", f"{QUERY}.scale", filled(0.0), "scale"),
    ("rtn", f"{QUERY}.scale", filled(-0.5), "scale"),
    ("rtn", f"{QUERY}.scale", filled(NAN), "scale"),
    ("rtn", f"{QUERY}.scale", filled(INF), "scale"),
    ("rtn", f"{QUERY}.scale", lambda t: t.bfloat16(), "BF16"),
    ("rtn", f"{QUERY}.codes", lambda t: t[:-1], "codes"),
    ("rtn", f"{QUERY}.codes", lambda t: t.view(torch.int8), "int8"),
    ("rtn", f"{QUERY}.codes", lambda t: t > 0, "BOOL"),
    ("rtn", f"{QUERY}.codes", lambda t: t.view(torch.float8_e4m3fn), "F8_E4M3"),
    ("rtn", f"{QUERY}.codes", lambda t: t.view(torch.float8_e5m2), "F8_E5M2"),
    ("rtn", f"{QUERY}.codes", lambda t: t.view(torch.uint16), "U16"),
    ("rtn", f"{QUERY}.codes", lambda t: t.double(), "F64"),
    ("rtn", f"{QUERY}.zero", lambda t: t[:-1], "zero"),
    ("rtn", f"{QUERY}.zero", lambda t: None, "zero"),
    ("rtn", f"{QUERY}.scale_step", lambda t: torch.ones(2, 2).half(), "scale_step"),
    ("rtn", "model.norm.weight", filled(NAN), "norm.weight"),
    ("rtn", "model.norm.weight", lambda t: t.int(), "norm.weight.*I32"),
    ("rtn", "model.embed_tokens.weight", lambda t: t.byte(), "embed_tokens.weight.*U8"),
    ("rtn", "model.norm.weight", lambda t: t[:-1], r"norm.weight is \[63\]"),
    ("order", f"{QUERY}.in_perm", filled(WIDTH), "in_perm"),
    ("order", f"{QUERY}.in_perm", filled(-1), "in_perm"),
    ("order", f"{QUERY}.in_perm", lambda t: torch.zeros_like(t), "in_perm"),
    ("order", f"{QUERY}.in_perm", lambda t: t.int(), "in_perm"),
    ("sparse", f"{DOWN}.scale_step", filled(INF), "scale_step"),
    ("sparse", f"{DOWN}.zero_zero", filled(NAN), "zero_zero"),
    ("sparse", f"{DOWN}.outlier_value", filled(NAN), "outlier_value"),
    ("sparse", f"{DOWN}.outlier_value", lambda t: t[:-1], "outlier_gap"),
    ("sparse", f"{DOWN}.outlier_gap", filled(255, -1), "outlier_gap"),
    ("sparse", f"{DOWN}.outlier_gap", lambda t: torch.full_like(t, 254), "outlier_gap"),
    ("sparse", f"{DOWN}.outlier_gap", lambda t: t.int(), "outlier_gap"),
    ("foreign", f"{DOWN}.row_offsets", filled(1), "row_offsets"),
    ("foreign", f"{DOWN}.row_offsets", filled(2**31 - 1, 3), "row_offsets"),
    ("foreign", f"{DOWN}.col_vals", filled(0xFFFF), "col_vals"),
    ("foreign", f"{DOWN}.col_vals", filled(0x7E000000), "col_vals"),
    ("foreign", f"{DOWN}.in_perm", lambda t: torch.zeros(48, dtype=torch.int32), "in_perm"),
    ("foreign", f"{DOWN}.dense_weights", filled(-1), "dense_weights"),
    ("foreign", f"{DOWN}.dense_weights", filled(1 << 54), "dense_weights"),
]


@pytest.mark.parametrize(("kind", "name", "change", "said"), ROUNDING + WEIGHTS)
def test_damaged_tensors_are_refused_by_name(
    kind: str,
    name: str,
    change: Callable[[Tensor], Tensor | None],
    said: str,
    copy: Directory,
) -> None:
    damaged = with_tensor(copy(kind), name, change)
    owner = name.rpartition(".")[0].removeprefix("model.")
    with pytest.raises(FormatError, match=said) as raised:
        quantine.load(damaged)
    assert owner in str(raised.value)
    assert len(str(raised.value).replace(str(damaged), "")) < 300


@pytest.mark.parametrize("index", range(0, len(ROUNDING), 4))
def test_transformers_refuses_them_too(index: int, copy: Directory) -> None:
    kind, name, change, said = ROUNDING[index]
    with pytest.raises(FormatError, match=said):
        AutoModelForCausalLM.from_pretrained(with_tensor(copy(kind), name, change))


def layer(config: dict[str, Any], name: str = QUERY) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]["layers"][name]
    return found


def listed(config: dict[str, Any], name: str) -> None:
    config["quantization_config"]["layers"][name] = layer(config)


def scheme(config: dict[str, Any], **changes: Any) -> None:
    config["quantization_config"]["schemes"][0].update(changes)


DESCRIPTIONS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("rtn", lambda c: layer(c).update(shape=[64, 32]), r"q_proj is \[64, 32\], but it is"),
    ("rtn", lambda c: layer(c).update(shape=[32, 64]), r"q_proj is \[32, 64\], but it is"),
    ("rtn", lambda c: layer(c).update(shape=[10**40, 64]), "q_proj has no shape"),
    ("rtn", lambda c: layer(c).update(shape=[True, 64]), "q_proj has no shape"),
    ("rtn", lambda c: layer(c).update(shape=[64, 65]), "32 do not divide lines of 65"),
    ("rtn", lambda c: layer(c).update(scheme=True), "q_proj has scheme True"),
    ("rtn", lambda c: listed(c, "model.layers.7.mlp.up_proj"), r"layers\.7.* has no such layer"),
    ("rtn", lambda c: listed(c, "x" * 900), "has no such layer"),
    ("rtn", lambda c: listed(c, "layers.1.self_attn.q_proj"), "twice|has no such layer"),
    ("rtn", lambda c: listed(c, "model.layers.0"), "is no matrix"),
    ("rtn", lambda c: listed(c, ""), "is no matrix"),
    ("rtn", lambda c: listed(c, "lm_head"), "lm_head"),
    ("rtn", lambda c: scheme(c, group_size=48), "48 do not divide"),
    ("rtn", lambda c: scheme(c, group_size=-7), "group_size"),
    ("rtn", lambda c: scheme(c, bits=9), "bits"),
    ("rtn", lambda c: scheme(c, bits=[4]), "bits"),
    ("rtn", lambda c: scheme(c, format=["dense"]), "scheme 0"),
    ("rtn", lambda c: scheme(c, cluster_sizes=[32, 32]), "cluster_sizes"),
    ("w4a4", lambda c: scheme(c, cluster_sizes=[]), "cluster_sizes"),
    ("w4a4", lambda c: scheme(c, cluster_sizes=[64, 1]), "cluster_sizes sum to 65"),
    ("w4a4", lambda c: scheme(c, cluster_sizes=[65, -1]), "cluster_sizes"),
    ("w4a4", lambda c: scheme(c, cluster_sizes="64"), "cluster_sizes"),
    ("w4a4", lambda c: c["quantization_config"].update(activations=[8]), "activations"),
    ("rtn", lambda c: c["quantization_config"].update(format_version=True), "format_version"),
    ("rtn", lambda c: c["quantization_config"].update(arithmetic="é" * 900), "arithmetic"),
]


@pytest.mark.parametrize(("kind", "change", "said"), DESCRIPTIONS)
def test_damaged_descriptions_are_refused_by_name(
    kind: str, change: Callable[[dict[str, Any]], object], said: str, copy: Directory
) -> None:
    damaged = with_config(copy(kind), change)
    with pytest.raises(FormatError, match=said) as raised:
        quantine.load(damaged)
    assert len(str(raised.value).replace(str(damaged), "")) < 300


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"sliding_window": 0}, "sliding_window"),
    ({"num_hidden_layers": 10**400}, "num_hidden_layers"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ({"return_dict": False}, "return_dict"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": NAN}}, "rope_theta"),
]


@pytest.mark.parametrize(("changes", "said"), SETTINGS)
def test_settings_that_would_fail_in_use_are_refused(
    changes: dict[str, Any], said: str, copy: Directory
) -> None:
    damaged = with_config(copy("rtn"), lambda config: config.update(changes))
    with pytest.raises(CheckpointError, match=said):
        quantine.load(damaged)


def test_settings_for_generation_are_checked(copy: Directory) -> None:
    damaged = copy("rtn")
    (damaged / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(CheckpointError, match="eos_token_id is 'x'"):
        quantine.load(damaged)


def test_a_tokenizer_that_fails_in_use_is_refused(copy: Directory) -> None:
    damaged = copy("rtn")
    path = damaged / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"model_max_length": "long"}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="tokenizer"):
        quantine.load(damaged)


@pytest.mark.parametrize("kind", PLANS)
def test_sound_directories_load(kind: str, made: Directory) -> None:
    model, _ = quantine.load(made(kind))
    logits = model(input_ids=torch.arange(20).unsqueeze(0)).logits
    assert bool(torch.isfinite(logits).all())


def test_a_model_without_its_head_needs_none_of_it(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = Plan.preset("rtn", bits=4, group_size=32).with_head(8)
    quantine.quantize(tiny("llama"), tmp_path / "out", plan, Calibration(samples=0))
    bare = AutoModel.from_pretrained(tmp_path / "out")
    assert bare(input_ids=torch.arange(4).unsqueeze(0)).last_hidden_state.shape == (1, 4, WIDTH)


def test_two_files_with_one_tensor_are_refused(copy: Directory) -> None:
    damaged = copy("rtn")
    tensors = load_file(damaged / "model.safetensors")
    (damaged / "model.safetensors").unlink()
    places = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    save_file(tensors, damaged / "a.safetensors", metadata={"format": "pt"})
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, damaged / "b.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": places})
    (damaged / "model.safetensors.index.json").write_text(index)
    with pytest.raises(QuantineError, match=r"model\.norm\.weight is in a\.safe.* and in b\.safe"):
        quantine.load(damaged)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_transformers_does_not_make_up_what_is_lost(copy: Directory, name: str) -> None:
    directory = copy("rtn")
    with_tensor(directory, name, lambda _: None)
    for loader in (quantine.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(FormatError, match=name):
            loader(directory)


def test_transformers_does_not_leave_out_what_is_there(copy: Directory) -> None:
    directory = copy("rtn")
    with_tensor(directory, "model.layers.2.more.weight", lambda _: torch.ones(2, 2))
    with pytest.raises(FormatError, match=r"model\.layers\.2\.more\.weight"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_class_with_another_head_gets_it_trained_anew(made: Directory) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(made("rtn"), num_labels=3)
    assert model.score.weight.shape == (3, WIDTH)
    assert AutoModel.from_pretrained(made("rtn")).get_output_embeddings() is None
