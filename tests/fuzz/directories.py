"""Damaged quantized directories: they are listed, read, loaded and run."""

from __future__ import annotations

import json
import shutil
import traceback
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
import transformers
from safetensors.torch import load_file

import quantine
from fuzz import tensors, values
from fuzz.campaign import Target
from quantine import Calibration, Plan
from quantine.formats.finished import FinishedDirectory
from quantine.formats.inventory import inventory
from tiny_models import build, matrices_of, mixed_rules, tiny_config

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
FIELDS: Final = (
    "sliding_window", "use_sliding_window", "layer_types", "rope_scaling", "rope_parameters",
    "rope_theta", "head_dim", "return_dict", "torchscript", "output_hidden_states",
    "output_attentions", "use_cache", "attention_chunk_size", "attn_logit_softcapping", "auto_map",
    "architectures", "_attn_implementation", "attn_implementation", "dtype", "torch_dtype",
    "is_encoder_decoder", "is_decoder", "add_cross_attention", "cache_implementation",
    "chunk_size_feed_forward", "pad_token_id", "eos_token_id", "bos_token_id", "hidden_act",
    "rms_norm_eps", "layerdrop", "attention_dropout", "initializer_range", "pretraining_tp",
    "max_length", "num_beams", "use_return_dict", "quantization_config", "transformers_weights",
    "max_position_embeddings", "final_logit_softcapping", "spqr_outliers", "quantine_arithmetic",
)  # fmt: skip
"""Fields of config.json that some model has."""
THROUGH_TRANSFORMERS: Final = 0.2
"""Share of mutants that are loaded with ``from_pretrained``."""
SOURCES: Final = str(Path(quantine.__file__).parent)
"""Where quantine's own code is."""
PASSES: Final = (5, 70)
"""Numbers of tokens of the forwards: few rows, which native kernels multiply straight with codes,
and many, for which they decode weights and multiply integers."""


def _plans() -> dict[str, tuple[str, Plan]]:
    """The tiny model and the plan of every directory that mutants are made of."""
    return {
        "sparse": ("llama", Plan.preset("spqr", bits=3, group_size=16, threshold=0.3)),
        "second": ("llama", Plan.preset("spqr-faithful", format="sparse")),
        "foreign": ("llama", Plan.preset("spqr-faithful", format="spqr")),
        "outputs": ("llama", Plan.preset("rtn", bits=4, group_size=32, group_axis="out")),
        "tied": ("llama_tied", Plan.preset("rtn", bits=4, group_size=32).with_head(4)),
        "clusters": ("llama", Plan.scheme("W4A4")),
        "factors": ("llama", Plan.scheme("W8A8")),
        "opt": ("opt", Plan.scheme("W4A4")),
        "floats": ("llama", Plan.scheme("W16A4")),
        "sliding": ("mistral", Plan.preset("rtn", bits=4, group_size=32)),
        "typed": ("gemma3", Plan.preset("rtn", bits=4, group_size=32)),
    }


def _mixed(model: Path) -> Plan:
    """Every matrix another width, some with a stored order of inputs."""
    rules = mixed_rules(matrices_of(model), groups="refit", clip="minmax")
    return Plan.from_dict({"rules": rules})


def build_bases(root: Path) -> None:
    """Quantize tiny models in every layout, a folder of ``root`` for each."""
    text = root / "text.txt"
    text.write_text("".join(f"Line {n}: {n * n % 97} apples.\n" for n in range(400)))
    short = Calibration(str(text), samples=2, seqlen=32)
    models: dict[str, Path] = {}
    for name, (kind, plan) in _plans().items():
        if kind not in models:
            models[kind] = build(tiny_config(kind), root / f"model-{kind}")
        quantine.quantize(models[kind], root / "bases" / name, plan, short)
    quantine.quantize(models["llama"], root / "bases" / "mixed", _mixed(models["llama"]), short)
    _split(root / "bases" / "sparse", root / "bases" / "sharded")
    for base in (root / "bases").iterdir():
        use(base)


def _split(whole: Path, directory: Path) -> None:
    """A copy of a directory with its tensors in two files."""
    shutil.copytree(whole, directory)
    names = sorted(load_file(directory / WEIGHTS))
    found = tensors.read((directory / WEIGHTS).read_bytes())
    (directory / WEIGHTS).unlink()
    places = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        (directory / file).write_bytes(tensors.written({name: found[name] for name in part}))
        places.update(dict.fromkeys(part, file))
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def attempt(random: Random, root: Path, place: Path) -> None:
    """Damage one directory, and use what is left of it in every way."""
    base = random.choice(sorted((root / "bases").iterdir()))
    shutil.copytree(base, place)
    damage(random, place)
    if random.random() < THROUGH_TRANSFORMERS:
        use_through_transformers(place)
    else:
        use(place)


def damage(random: Random, place: Path) -> None:
    """Change a file of ``place``."""
    weights = sorted(place.glob("model*.safetensors"))
    kind = random.random()
    if kind < 0.55:
        _rewrite(random, random.choice(weights), tensors.mutated_tensors)
    elif kind < 0.7:
        below = ("quantization_config",)
        _rewrite(random, place / "config.json", lambda r, d: values.mutated_json(r, d, below))
    elif kind < 0.82:
        mutate = random.choice((values.mutated_json, _with_field))
        _rewrite(random, place / "config.json", mutate)
    else:
        file = random.choice(sorted(place.iterdir()))
        _whole_file(random, file) if random.random() < 0.3 else _content(random, file)


def _with_field(random: Random, data: bytes) -> bytes:
    """A configuration with a field more, which transformers knows, and any value."""
    value = json.loads(data)
    value[random.choice(FIELDS)] = values.any_value(random)
    return json.dumps(value).encode()


def _content(random: Random, file: Path) -> None:
    mutate: Any = values.mutated_json if file.suffix == ".json" else values.mutated_bytes
    _rewrite(random, file, mutate)


def _rewrite(random: Random, file: Path, mutate: Any) -> None:
    file.write_bytes(mutate(random, file.read_bytes()))


def _whole_file(random: Random, file: Path) -> None:
    kind = random.randrange(5)
    if kind == 0:
        file.write_bytes(b"")
    elif kind == 1:
        file.write_bytes(random.choice(sorted(file.parent.iterdir())).read_bytes())
    else:
        file.unlink()
    if kind == 3:
        file.mkdir()
    elif kind == 4:
        file.symlink_to(file.name)


def use(place: Path) -> None:
    """List, unpack, load, run and generate; the first error is what counts."""
    first: quantine.QuantineError | None = None
    for way in (_listed, _loaded):
        try:
            way(place)
        except quantine.QuantineError as error:
            first = first or error
    if first is not None:
        raise first


def _listed(place: Path) -> None:
    inventory(place)
    finished = FinishedDirectory(place)
    for name in finished.description.layers:
        finished.qtensor(name).dequantize()


def use_through_transformers(place: Path) -> None:
    """Load with transformers alone, and run. What it refuses by itself is not quantine's."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(place)
    except quantine.QuantineError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if SOURCES in frames[-1].filename:
            raise
        raise quantine.CheckpointError("refused by transformers") from error
    _run(model)


def _loaded(place: Path) -> None:
    model, tokenizer = quantine.load(place)
    _run(model)
    prompt = tokenizer("apples", return_tensors="pt")["input_ids"]
    if prompt.numel():
        model.generate(prompt, max_new_tokens=3, do_sample=False)


@torch.no_grad()
def _run(model: Any) -> None:
    for count in PASSES:
        model(input_ids=torch.arange(count).unsqueeze(0))


DIRECTORIES: Final = Target("directories", 0.55, build_bases, attempt)
