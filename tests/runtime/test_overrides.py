"""Whatever is put into a model counts in ``generate``: a property over all that decode natively."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn

from quantine import load
from quantine.runtime.decoder_structures import STRUCTURES
from quantine.runtime.hf_generate import Generate
from tiny_models import FAMILIES, random_model, some_tokens, tiny_config

Packed = Callable[[str, str], Path]

ENTIRELY: Final = ("llama_tied", "gemma3", "opt")
"""Variants in which every module is replaced in every way."""
NATIVE: Final = (*ENTIRELY, "mistral", "qwen2", "qwen3", "smollm3")
"""Variants with packed matrices."""
FURTHER: Final = (
    "gemma2",
    "phi3",
    "neox_parallel",
    "gpt2",
    "bloom",
    "falcon_new",
    "falcon_alibi",
)
"""Variants with other blocks; smaller, with float matrices, and some are tried in one way."""
ROUNDING: Final = "W4A4-strict"
"""A scheme in which every site has a grid."""
APART: Final = frozenset({"granite", "olmo2", "glm4"})
"""Model types that have tests of their own."""


def test_every_model_type_is_tried() -> None:
    native = {FAMILIES[name][0] for name in (*NATIVE, *FURTHER)}
    assert native | APART == set(STRUCTURES)
    table = (Path(__file__).parents[2] / "docs" / "loading.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    said = {kind: row[2].split()[0].strip(",:") for row in rows for kind in row[1].split("`")[1::2]}
    assert {kind for kind in said if said[kind] == "yes"} == set(STRUCTURES)


def changed(value: Any) -> Any:
    """An output that differs: every channel of its first tensor has another sign and size."""
    if torch.is_tensor(value):
        ramp = torch.linspace(-1.5, 1.0, value.shape[-1], dtype=value.dtype)
        return value * ramp
    if isinstance(value, tuple):
        return (changed(value[0]), *value[1:])
    for name in ("logits", "last_hidden_state"):
        if name in value:
            value[name] = changed(value[name])
    return value


class Wrapper(nn.Module):
    """A module around another one, as control vectors and adapters have them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return changed(self.inner(*args, **kwargs))


@contextmanager
def subclass(model: Any, path: str) -> Iterator[None]:
    module = model.get_submodule(path)
    kind = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return changed(kind.forward(self, *args, **kwargs))

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    try:
        yield
    finally:
        module.__class__ = kind


@contextmanager
def wrapper(model: Any, path: str) -> Iterator[None]:
    parent, _, leaf = path.rpartition(".")
    owner, module = model.get_submodule(parent), model.get_submodule(path)
    setattr(owner, leaf, Wrapper(module))
    try:
        yield
    finally:
        setattr(owner, leaf, module)


@contextmanager
def patch(model: Any, path: str) -> Iterator[None]:
    module = model.get_submodule(path)
    old = module.forward
    module.forward = lambda *args, **kwargs: changed(old(*args, **kwargs))
    try:
        yield
    finally:
        del module.forward


@contextmanager
def class_patch(model: Any, path: str) -> Iterator[None]:
    kind = type(model.get_submodule(path))
    old = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return changed(old(self, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(kind, "forward", forward)
        yield


@contextmanager
def hook(model: Any, path: str) -> Iterator[None]:
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda module, args, output: changed(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def pre_hook(model: Any, path: str) -> Iterator[None]:
    def first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and torch.is_tensor(args[0]) and args[0].is_floating_point():
            return (changed(args[0]), *args[1:]), kwargs
        if args and torch.is_tensor(args[0]):
            return ((args[0] + 7) % 256, *args[1:]), kwargs
        names = ("hidden_states", "input_ids")
        name = next(name for name in names if kwargs.get(name) is not None)
        value = kwargs[name]
        other = changed(value) if value.is_floating_point() else (value + 7) % 256
        return args, {**kwargs, name: other}

    handle = model.get_submodule(path).register_forward_pre_hook(first, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def accelerate_hook(model: Any, path: str) -> Iterator[None]:
    hooks = pytest.importorskip("accelerate.hooks")

    class Changes(hooks.ModelHook):  # type: ignore[name-defined,misc]
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return changed(output)

    module = model.get_submodule(path)
    hooks.add_hook_to_module(module, Changes())
    try:
        yield
    finally:
        hooks.remove_hook_from_module(module)


@contextmanager
def global_hook(model: Any, path: str) -> Iterator[None]:
    target = model.get_submodule(path)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: changed(output) if module is target else None
    )
    try:
        yield
    finally:
        handle.remove()


WAYS: Final = (
    subclass,
    wrapper,
    patch,
    class_patch,
    hook,
    pre_hook,
    accelerate_hook,
    global_hook,
)


def scores(model: Any, generate: Callable[..., Tensor]) -> Tensor:
    """The scores ``[tokens, vocabulary]`` from which ``generate`` chooses."""
    seen: list[Tensor] = []

    def look(_: Tensor, found: Tensor) -> Tensor:
        seen.append(found[0].clone())
        return found

    made = generate(some_tokens(6, 1), max_new_tokens=2, do_sample=False, logits_processor=[look])
    assert made.shape == (1, 8)
    return torch.stack(seen)


def far(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-4 * float(b.abs().max())


def by_modules(model: Any) -> Tensor:
    """The scores of the modules alone."""
    return scores(model, lambda *a, **k: type(model).generate(model, *a, **k))


def check_follows(model: Any, wanted: Tensor, what: str) -> None:
    """``model.generate`` gives ``wanted``, at first after an earlier call, then in its first."""
    assert not far(scores(model, model.generate), wanted), what
    check_begins(model, wanted, what)


def check_begins(model: Any, wanted: Tensor, what: str) -> None:
    """The first call of ``model.generate`` gives ``wanted``."""
    model.generate = Generate(model)
    assert not far(scores(model, model.generate), wanted), what


def check_returns(model: Any, before: Tensor, what: str) -> None:
    """``model.generate`` is native again, and gives ``before``."""
    assert torch.equal(scores(model, model.generate), before), what
    assert decodes(model), what


def compared(model: Any, change: Any, before: Tensor, what: str) -> bool:
    """Compare while ``change`` lasts, and afterwards; whether the change had an effect."""
    with change:
        wanted = by_modules(model)
        check_follows(model, wanted, what)
    check_returns(model, before, what)
    return far(wanted, before)


def decodes(model: Any) -> bool:
    """Whether the last call of ``generate`` was native."""
    return model.generate._kept is not None


def generating(packed: Packed, name: str, kind: str = "rtn") -> tuple[Any, Tensor]:
    """A model that has generated natively, and the scores it had."""
    if name in FURTHER:
        model = random_model(tiny_config(name, num_hidden_layers=2))
        model.generate = Generate(model)
    else:
        model = load(packed(name, kind), dtype=torch.float32)[0]
    model.generation_config.eos_token_id = None
    before = scores(model, model.generate)
    assert decodes(model)
    return model, before


def tried_paths(model: Any) -> list[str]:
    """Paths of all modules, of one block only."""
    return [
        path
        for path, module in model.named_modules()
        if not re.search(r"\.(layers|h)\.[02]", path)
        and not isinstance(module, nn.ModuleList | nn.Dropout)
    ]


IDLE: Final = {"opt": "model", "falcon_alibi": "transformer.rotary_emb"}
"""A module that is not called: OPT calls what is inside, and ALiBi rotates nothing."""
EFFECTS: Final = {
    "gemma2": {"scaling", "eps", "num_hidden_layers", "final_logit_softcapping"},
    "gemma3": {"scaling", "eps", "num_hidden_layers"},
    "opt": {"scaling", "eps"},
    "gpt2": {"scaling", "eps"},
    "neox_parallel": {"scaling", "eps", "use_parallel_residual"},
    "bloom": {"inv_norm_factor", "beta", "apply_residual_connection_post_layernorm"},
    "falcon_new": {"eps", "_output_attentions"},
    "falcon_alibi": {"eps", "use_alibi", "_output_attentions"},
}
"""Attributes whose change must be seen to have an effect."""


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *itertools.product(ENTIRELY, WAYS),
        ("mistral", patch),
        ("mistral", accelerate_hook),
        ("qwen2", subclass),
        ("qwen2", pre_hook),
        ("qwen3", wrapper),
        ("qwen3", global_hook),
        ("smollm3", class_patch),
        ("smollm3", hook),
        ("gpt2", class_patch),
        ("bloom", subclass),
        ("falcon_alibi", hook),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_replaced_computation_counts(name: str, way: Any, packed: Packed) -> None:
    model, before = generating(packed, name)
    paths = tried_paths(model)
    assert len(paths) > 15
    idle = IDLE.get(name, "no module")
    tried = [path for path in paths if fits(path, way) and path != idle]
    effects = {path: compared(model, way(model, path), before, path) for path in tried}
    assert all(effects.values()), effects


@pytest.mark.parametrize("way", [subclass, hook])
def test_replaced_rounding_counts(way: Any, packed: Packed) -> None:
    model, before = generating(packed, "llama", ROUNDING)
    own = ("norm", ".inputs", ".query", ".key", ".value")
    tried = [path for path in tried_paths(model) if ".layers." in path and path.endswith(own)]
    assert len(tried) == 4 + 7 + 3  # norms with what is in them, matrices, attention
    effects = {path: compared(model, way(model, path), before, path) for path in tried}
    assert all(effects.values()), effects


def fits(path: str, way: Any) -> bool:
    """Whether a module can be replaced in this way: not the model itself, and positions have no
    states as inputs."""
    if way is wrapper:
        return path != ""
    return way is not pre_hook or not path.endswith(("rotary_emb", "embed_positions"))


OTHER: Final[dict[type, Callable[[Any], Any]]] = {
    bool: lambda value: not value,
    int: lambda value: value - 1,
    float: lambda value: value * 1.7 + 0.3,
}
"""Another value for an attribute, by its type."""


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


@pytest.mark.parametrize("name", [*NATIVE, *FURTHER])
def test_changed_attributes_count(name: str, packed: Packed) -> None:
    model, before = generating(packed, name)
    owners = {type(module := model.get_submodule(path)): module for path in tried_paths(model)}
    effects = set()
    for owner in (*owners.values(), model.config):
        for key, value in list(vars(owner).items()):
            other = OTHER.get(type(value), lambda _: None)(value)
            if other is None or key in vars(nn.Module()) or key == "is_encoder_decoder":
                continue
            what = f"{type(owner).__name__}.{key}"
            with attribute(owner, key, other):
                try:
                    wanted = by_modules(model)
                except Exception:  # heads that do not fit, and the like
                    continue
                if not far(wanted, before):  # what was kept of an earlier call would be right, too
                    check_begins(model, wanted, what)
                    continue
                check_follows(model, wanted, what)
            check_returns(model, before, what)
            effects.add(key)
    assert EFFECTS.get(name, {"scaling", "variance_epsilon", "num_hidden_layers"}) <= effects


def scaled(tensor: Tensor) -> Tensor:
    return tensor.detach() * -1.5 + 0.25


@contextmanager
def data(owner: nn.Module, name: str) -> Iterator[None]:
    tensor = owner.get_parameter(name) if name in owner._parameters else owner.get_buffer(name)
    old = tensor.data
    tensor.data = scaled(tensor)
    try:
        yield
    finally:
        tensor.data = old


@contextmanager
def written(owner: nn.Module, name: str) -> Iterator[None]:
    tensor = getattr(owner, name)
    old = tensor.detach().clone()
    with torch.no_grad():
        tensor.copy_(scaled(tensor))
    try:
        yield
    finally:
        with torch.no_grad():
            tensor.copy_(old)


@contextmanager
def written_unseen(owner: nn.Module, name: str) -> Iterator[None]:
    tensor = getattr(owner, name)
    old = tensor.detach().clone()
    tensor.data.copy_(scaled(tensor))
    try:
        yield
    finally:
        tensor.data.copy_(old)


@contextmanager
def exchanged(owner: nn.Module, name: str) -> Iterator[None]:
    old = getattr(owner, name)
    new = scaled(old)
    setattr(owner, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    try:
        yield
    finally:
        setattr(owner, name, old)


@pytest.mark.parametrize("way", [data, written, written_unseen, exchanged])
@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "gemma3", "opt"])
def test_changed_tensors_count(name: str, way: Any, packed: Packed) -> None:
    model, before = generating(packed, name)
    for path in tried_paths(model):
        module = model.get_submodule(path)
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            packed_codes = path.endswith(("proj", "fc1", "fc2")) and key != "bias"
            if tensor is None or "original" in key or (packed_codes and way is not exchanged):
                continue
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            effect = compared(model, way(module, key), before, f"{path}.{key}")
            assert effect or path.endswith("k_proj")  # a bias of keys is the same for all of them


@pytest.mark.parametrize("way", [data, written, written_unseen, exchanged])
def test_changed_grids_count(way: Any, packed: Packed) -> None:
    model, before = generating(packed, "llama", ROUNDING)
    block = model.model.layers[1]
    for grid in (block.mlp.down_proj.inputs, block.self_attn.sites.key):
        assert compared(model, way(grid, "zero"), before, "zero")


def test_changed_settings_of_rounding_count(packed: Packed) -> None:
    model, before = generating(packed, "llama", ROUNDING)
    block = model.model.layers[1]
    sites = block.self_attn.sites
    changes = [(sites, "softmax", 2), (sites, "relative", False), (sites.key, "bits", 2)]
    for owner, name, value in [*changes, (block.mlp.up_proj.inputs, "bits", 3)]:
        assert compared(model, attribute(owner, name, value), before, name), name
