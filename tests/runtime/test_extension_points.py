"""Extension points of transformers and PyTorch beside which the native decoder must not run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GenerationMixin

from quantine import load
from quantine.activations.grids import TokenGrid
from quantine.errors import BackendUnavailable
from quantine.runtime.decoder import decoder_for
from quantine.runtime.definitions import Definitions
from tiny_models import FAMILIES, random_model, some_tokens, tiny_config

Packed = Callable[[str, str], Path]
ASKED: Final = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def model(packed: Packed) -> Any:
    """A model that has generated natively."""
    model = load(packed("llama", "rtn"), dtype=torch.float32)[0]
    model.generation_config.eos_token_id = None
    model.generate(some_tokens(9, 1), **ASKED)
    assert is_native(model)
    return model


def is_native(model: Any) -> bool:
    """Whether a decoder is kept."""
    return model.generate._kept is not None


def check_follows(model: Any, *, native: bool = False) -> None:
    """``generate`` gives what the modules give, natively or not."""
    tokens = some_tokens(9, 1)
    wanted = type(model).generate(model, tokens, **ASKED)
    assert torch.equal(model.generate(tokens, **ASKED), wanted)
    assert is_native(model) == native


@pytest.mark.parametrize("name", FAMILIES)
def test_libraries_as_they_are_count_as_their_own(name: str) -> None:
    definitions = Definitions(random_model(tiny_config(name)))
    assert definitions.patched() is None
    assert definitions.hold()


def test_what_a_compiler_leaves_behind_changes_nothing(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("__compiled_fn_1_ab", "__resume_at_40_5"):
        monkeypatch.setattr(modeling(model), name, lambda: None, raising=False)
    check_follows(model, native=True)


def backwards(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the last of its results, or the only one, upside down."""

    @functools.wraps(function)
    def other(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return -found if torch.is_tensor(found) else (*found[:-1], found[-1])

    return other


def modeling(model: Any) -> Any:
    return sys.modules[type(model).__module__]


class TestPatchedLibraries:
    """Functions and classes that others replace for speed, or to experiment."""

    def test_a_function_of_the_models_file(
        self, model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = modeling(model)
        monkeypatch.setattr(home, "apply_rotary_pos_emb", lambda q, k, *_, **__: (q, k))
        with pytest.raises(BackendUnavailable, match=r"modeling_llama.apply_rotary_pos_emb was re"):
            decoder_for(model, 8)
        check_follows(model)
        monkeypatch.undo()
        check_follows(model, native=True)

    def test_a_class_of_the_models_file(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        class LlamaRMSNorm(nn.Identity):
            pass

        monkeypatch.setattr(modeling(model), "LlamaRMSNorm", LlamaRMSNorm)
        with pytest.raises(BackendUnavailable, match="LlamaRMSNorm was replaced"):
            decoder_for(model, 8)

    def test_another_forward_of_the_same_file(
        self, model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = modeling(model)
        monkeypatch.setattr(home.LlamaMLP, "forward", home.LlamaRMSNorm.forward)
        with pytest.raises(BackendUnavailable, match=r"LlamaMLP.forward was replaced"):
            decoder_for(model, 8)

    def test_attention_of_pytorch(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        functional = torch.nn.functional
        other = backwards(functional.scaled_dot_product_attention)
        monkeypatch.setattr(functional, "scaled_dot_product_attention", other)
        check_follows(model)
        partial = functools.partial(functional.silu, inplace=True)
        monkeypatch.undo()
        monkeypatch.setattr(functional, "silu", partial)
        check_follows(model)

    def test_registered_attention_and_masks(
        self, model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for kind in (AttentionInterface, AttentionMaskInterface):
            mapping = kind._global_mapping
            monkeypatch.setitem(mapping, "sdpa", backwards(mapping["sdpa"]))
            with pytest.raises(BackendUnavailable, match="function or mask 'sdpa' was replaced"):
                decoder_for(model, 8)
            monkeypatch.undo()

    def test_the_cache(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        update = DynamicCache.update

        def scaled(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            return update(self, keys, values * -1.5, *args, **kwargs)

        monkeypatch.setattr(DynamicCache, "update", scaled)
        check_follows(model)

    def test_generation(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        prepare = GenerationMixin.prepare_inputs_for_generation

        def shifted(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            return prepare(self, (input_ids + 5) % 256, *args, **kwargs)

        monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", shifted)
        check_follows(model)


class TestAdapters:
    """What adapters do to a model, as peft does it."""

    def test_one_that_prepares_its_own_inputs(self, model: Any) -> None:
        prompt = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))

        def prepare(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            cls = type(model)
            found = cls.prepare_inputs_for_generation(model, input_ids, *args, **kwargs)
            cache = found.get("past_key_values")
            if cache is None or cache.get_seq_length() == 0:  # the soft prompt comes first
                embedded = model.get_input_embeddings()(found.pop("input_ids"))
                found["inputs_embeds"] = torch.cat([prompt, embedded], dim=1)
            found.pop("position_ids", None)
            return found

        model.prepare_inputs_for_generation = prepare
        check_follows(model)
        del model.prepare_inputs_for_generation
        check_follows(model, native=True)

    def test_one_around_matrices(self, model: Any) -> None:
        class Adapted(nn.Module):
            def __init__(self, base: nn.Module) -> None:
                super().__init__()
                self.base_layer = base
                self.lora = nn.Linear(64, base.out_features, bias=False)

            def forward(self, x: Tensor) -> Tensor:
                return self.base_layer(x) + self.lora(x)

        for layer in model.model.layers:
            layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj).eval()
        check_follows(model)
        for layer in model.model.layers:
            layer.self_attn.q_proj = layer.self_attn.q_proj.base_layer
        check_follows(model, native=True)

    def test_one_inside_of_a_linear(self, packed: Packed) -> None:
        model = load(packed("llama", "rtn"), dtype=torch.float32)[0]
        model.generation_config.eos_token_id = None
        model.lm_head.weight.data = model.lm_head.weight.data.clone()
        torch.nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Negative())
        check_follows(model)


class Negative(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -weight


def test_hidden_states_once_do_not_end_native_decoding(model: Any) -> None:
    model(some_tokens(9, 1), output_hidden_states=True)
    model(some_tokens(9, 1), output_attentions=True)
    assert any(module._forward_hooks for module in model.modules())
    check_follows(model, native=True)
    hook = model.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    check_follows(model)
    hook.remove()
    check_follows(model, native=True)


def test_rounded_inputs_are_not_skipped(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.inputs = TokenGrid(3)
    check_follows(model, native=True)


def test_matrices_of_several_arithmetics_are_refused(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.arithmetic = "fast"
    with pytest.raises(BackendUnavailable, match="some matrices have exact and others fast"):
        decoder_for(model, 8)
    decoder_for(model, 8, arithmetic="exact")
    check_follows(model)


def test_pruned_and_repeated_blocks(model: Any) -> None:
    blocks = model.model.layers
    for order in ([1, 0], [0, 0]):
        model.model.layers = nn.ModuleList(blocks[i] for i in order)
        model.config.num_hidden_layers = len(order)
        check_follows(model)
    model.model.layers, model.config.num_hidden_layers = blocks, 2
    check_follows(model, native=True)


def test_a_compiled_call_is_left_to_it(model: Any) -> None:
    model.model.norm._compiled_call_impl = model.model.norm.forward
    check_follows(model)


def test_inference_mode_is_no_reason(model: Any) -> None:
    with torch.inference_mode():
        check_follows(model, native=True)
    check_follows(model, native=True)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_tensors_of_other_layouts_are_left_to_pytorch(model: Any) -> None:
    weight = model.lm_head.weight.data.to_sparse_csr()
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(BackendUnavailable, match="lm_head has a tensor of layout"):
        decoder_for(model, 8)
