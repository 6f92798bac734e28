"""The quantization config and the quantizer that quantine registers with transformers.

With them ``from_pretrained`` loads quantine's directories. Imported only once transformers itself
is, see ``quantine/__init__.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantine.activations.attention import NAME as ATTENTION
from quantine.core.arithmetic import UNSTATED, Arithmetic
from quantine.errors import FamilyError, FormatError, cut
from quantine.families.experts import experts_in, separate
from quantine.families.family import Family
from quantine.families.layers import embedding_scale, matrix_shape
from quantine.formats import format_named
from quantine.formats.complete import check_kept, parameters_without
from quantine.formats.description import FORMAT_VERSION, LOCK, METHOD
from quantine.formats.headers import Entry, entries_of
from quantine.formats.stored_config import check_description, spec_of
from quantine.runtime.device_map import computes_on_cpu
from quantine.runtime.experts import PackedExperts
from quantine.runtime.float_dtypes import convert_floats, float_dtypes
from quantine.runtime.loaded import check_loaded
from quantine.runtime.methods import replace_methods
from quantine.runtime.modules import QuantEmbedding, QuantLinear, TiedHead
from quantine.runtime.packed import Packed
from quantine.runtime.placeholder import placeholder
from quantine.runtime.rounded_blocks import rebuild
from quantine.source.names import listed, not_understood
from quantine.source.settings import attention_of, check_settings

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class QuantineConfig(QuantizationConfigMixin):
    """The ``quantization_config`` in config.json of an output directory, see docs/format.md.

    Args:
        format_version: version of docs/format.md that the files follow.
        schemes: the distinct schemes, as plain values.
        layers: for every quantized matrix, by module name, ``scheme`` (index into ``schemes``) and
            ``shape`` (``[out, in]``).
        arithmetic: arithmetic of products with these matrices, see `quantine.kernels.matrix`.
        activations: how activations are rounded, as plain values of
            `quantine.core.activation_spec.ActivationSpec`; ``None`` where they are not.
        unknown: fields of newer versions, which are refused.

    Raises:
        FormatError: there are unknown fields, or the values are not valid.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        schemes: list[dict[str, Any]] | None = None,
        layers: dict[str, dict[str, Any]] | None = None,
        arithmetic: Arithmetic = UNSTATED,
        activations: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # the enum knows no plug-ins
        self.format_version = format_version
        self.schemes = schemes or []
        self.layers = layers or {}
        self.arithmetic = arithmetic
        if activations is not None:
            self.activations = activations
        unknown.pop("quant_method", None)
        if unknown:
            raise FormatError(
                f"quantization_config has unknown fields {sorted(unknown)}: "
                "install a newer quantine"
            )
        check_description(
            {
                "format_version": format_version,
                "schemes": schemes,
                "layers": layers,
                "arithmetic": arithmetic,
                "activations": activations,
            }
        )


class QuantineQuantizer(HfQuantizer):
    """Lets transformers build packed modules in place of float ones when it loads a model."""

    requires_calibration = True
    _spread = False  # over several devices
    _chooses = False  # experts, token by token
    _family: Family | None = None  # where activations are rounded

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Remove `LOCK` from ``config``, and choose the attention that the model needs.

        transformers calls it before it looks for weight files and builds the model.
        """
        if getattr(config, "transformers_weights", None) == LOCK:
            del config.transformers_weights
        if config._attn_implementation in (None, "sdpa"):
            config._attn_implementation = attention_of(config) or config._attn_implementation
        return config

    def update_device_map(self, device_map: Any) -> Any:
        """A map of the caller, if it is one, with which modules on the CPU compute there."""
        if not isinstance(device_map, dict):
            return device_map
        self._spread = len(set(device_map.values())) > 1
        return computes_on_cpu(device_map)

    def validate_environment(self, *_: Any, device_map: Any = None, **more: Any) -> None:
        """Change a map that transformers has computed, as `update_device_map` does a caller's own.

        transformers shows it here, and nothing beside it, before it reads weights.
        """
        if isinstance(device_map, dict) and not more:
            device_map.update(self.update_device_map(device_map))

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        check_settings(model.config)
        separate(model, PackedExperts)
        self._chooses = bool(experts_in(model))
        entries = entries_of(Path(file) for file in checkpoint_files or [])
        config = self.quantization_config
        assert isinstance(config, QuantineConfig)
        for name, layer in config.layers.items():
            place = _place(model, name)
            if place is not None:
                scheme = config.schemes[layer["scheme"]]
                old = model.get_submodule(place)
                _check_place(name, old, layer["shape"])
                tensors = _placeholders(scheme["format"], (name, place), entries)
                module = _packed(old, scheme, layer["shape"], tensors)
                module.arithmetic = config.arithmetic
                _replace(model, place, module)
        _tie_head(model)
        if hasattr(config, "activations"):
            self._family = rebuild(model, config.activations, entries)
        check_kept(model, entries)
        _check_names(model, entries)
        self._dtypes = float_dtypes(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        convert_floats(model, self._dtypes)
        check_loaded(model, self._family)
        if self._family is not None and self._family.attends:
            model.set_attn_implementation(ATTENTION)
        _part_empty_tensors(model)
        replace_methods(model)

    def update_weight_conversions(self, weight_conversions: Any, *_: Any) -> Any:
        """None where experts have modules of their own: files have the names that these have.

        transformers 5.19 does not hand over the model, so nothing is asked of it here.
        """
        return [] if self._chooses else weight_conversions

    def is_serializable(self) -> bool:
        """True: ``save_pretrained`` writes packed tensors as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` compiles the model where it has a static cache.

        Models that are spread over devices are not compiled, nor those that look at numbers to
        choose which experts to run.
        """
        return not (self._spread or self._chooses)

    @property
    def is_trainable(self) -> bool:
        """False: packed weights have no gradient."""
        return False


def register(auto: Any) -> None:
    """Register `QuantineConfig` and `QuantineQuantizer` with transformers under `METHOD`.

    Args:
        auto: the module ``transformers.quantizers.auto``.
    """
    auto.register_quantization_config(METHOD)(QuantineConfig)
    auto.register_quantizer(METHOD)(QuantineQuantizer)


def _part_empty_tensors(model: nn.Module) -> None:
    """Give every empty buffer, such as the outliers of a matrix without any, a place of its own.

    Those of a file are all in one place, which ``torch.save`` refuses if their dtypes differ.
    """
    for module in model.modules():
        for name, tensor in module.named_buffers(recurse=False):
            if tensor.numel() == 0:
                module._buffers[name] = torch.empty_like(tensor)


def _place(model: PreTrainedModel, name: str) -> str | None:
    """Path of the layer ``name`` in ``model``, or ``None`` for the head of a model without it.

    Such a model lacks the prefix of all other names, too.

    Raises:
        FormatError: the model has no such layer.
    """
    for candidate in (name, name.removeprefix(f"{model.base_model_prefix}.")):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    if model.get_output_embeddings() is None and not name.startswith(model.base_model_prefix):
        return None
    raise FormatError(
        f"config.json lists {cut(name)} as quantized, but the model it describes has no such layer"
    )


def _check_place(name: str, old: nn.Module, shape: list[int]) -> None:
    """Refuse to put a packed matrix in the place of a module that is none, or of another shape.

    Args:
        name: of the layer in config.json.
        old: what the model has there.
        shape: ``[out, in]``, as config.json has it.

    Raises:
        FormatError: says what the model has there.
    """
    if isinstance(old, Packed):
        raise FormatError(f"config.json lists {cut(name)} twice, under two names")
    try:
        found = list(matrix_shape(old, cut(name)))
    except FamilyError as error:
        raise FormatError(f"config.json lists as quantized what is no matrix: {error}") from error
    if found != shape:
        raise FormatError(
            f"config.json says that {name} is {cut(shape)}, but it is {found} in the model that it "
            "describes: it is damaged"
        )


def _check_names(model: PreTrainedModel, entries: dict[str, Entry]) -> None:
    """Refuse files that lack a tensor of the model, or hold one that it has no place for.

    transformers only warns, and leaves what is missing as it finds it in memory. A class with
    another head than that of a language model gets it trained anew, and a bare model has none.

    Raises:
        FormatError: names the tensors.
    """
    prefix, names = f"{model.base_model_prefix}.", set(model.state_dict())
    whole = type(model).__name__.endswith("ForCausalLM")
    bare = not hasattr(model, model.base_model_prefix)
    missing = [
        name
        for name in parameters_without(model, entries)
        if whole or bare or name.startswith(prefix)
    ]
    if missing:
        raise FormatError(f"no file holds {listed(sorted(missing))}: the directory is damaged")
    names |= {name.removeprefix(prefix) for name in names} | {prefix + name for name in names}
    unknown = not_understood(model, sorted(set(entries) - names)) if whole else []
    if unknown:
        raise FormatError(
            f"files hold {listed(unknown)} for which the model that config.json describes has no "
            "place: the directory is damaged"
        )


def _packed(
    old: nn.Module, scheme: dict[str, Any], shape: list[int], tensors: dict[str, Tensor]
) -> Packed:
    """The packed module that takes the place of ``old``.

    Args:
        old: the model's own module: an embedding, ``Linear`` or ``Conv1D``.
        scheme: the layer's scheme, as plain values.
        shape: ``[out, in]``.
        tensors: tensors on the meta device, by name within the layer.
    """
    layout, spec = scheme["format"], spec_of(scheme)
    if isinstance(old, nn.Embedding):
        scale = embedding_scale(old)
        if scale is None:
            raise FormatError(f"a {type(old).__name__} looks up more than the rows of its table")
        return QuantEmbedding(layout, spec, shape[0], shape[1], tensors, scale, old.weight.dtype)
    bias: nn.Parameter | None = getattr(old, "bias", None)
    return QuantLinear(layout, spec, shape[0], shape[1], tensors, bias)


def _placeholders(
    layout: str, paths: tuple[str, ...], entries: dict[str, Entry]
) -> dict[str, Tensor]:
    """Tensors on the meta device with the shapes and dtypes of a layer's tensors in the files.

    Args:
        layout: name of the packed layout.
        paths: full names that the layer may have in the files; the first that is there counts.
        entries: headers of all tensors in the files, by name.

    Raises:
        FormatError: the files hold no tensor of the layer.
    """
    for path in paths:  # files that save_pretrained wrote for a bare model lack the prefix
        names = {key: f"{path}.{key}" for key in format_named(layout).tensor_names}
        found = {key: entries[name] for key, name in names.items() if name in entries}
        if found:
            return {key: placeholder(entry) for key, entry in found.items()}
    raise FormatError(f"config.json lists {paths[0]} as quantized, but no file holds its tensors")


def _tie_head(model: PreTrainedModel) -> None:
    """Share the packed table of a model with tied embeddings, and stop transformers from tying.

    Packed modules have no ``weight`` for transformers to share.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    packed = isinstance(table, QuantEmbedding) or isinstance(head, QuantLinear)
    if not packed:
        return
    if model.config.tie_word_embeddings and isinstance(table, QuantEmbedding) and head is not None:
        names = {id(module): name for name, module in model.named_modules()}
        _replace(model, names[id(head)], TiedHead(table, getattr(head, "bias", None)))
    model.all_tied_weights_keys.clear()


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    name, _, leaf = path.rpartition(".")
    parent = model.get_submodule(name)
    setattr(parent, leaf, module)
    if not parent._buffers:
        # Keeps transformers from initializing what it does not have: GPT-2's initializer of an
        # attention or MLP module reaches for the weights of the children. Parameters are read from
        # the files, which have been checked to hold them all.
        parent._is_hf_initialized = True  # type: ignore[assignment]
