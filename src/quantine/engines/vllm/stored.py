"""What a quantized directory holds, by the names that vLLM asks for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from quantine.core.activation_spec import (
    CONSUMED,
    REORDERS,
    SITES,
    UNQUANTIZED,
    ActivationSpec,
    activations_from,
)
from quantine.core.arithmetic import UNSTATED, Arithmetic
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError, PlanError, cut
from quantine.families import described_family
from quantine.families.family import Family
from quantine.families.layers import INPUTS_NAME
from quantine.formats import format_named
from quantine.formats.foreign.engines import VLLM_UNSERVED
from quantine.formats.stored_config import check_description, spec_of
from quantine.source.names import listed

ORDER: Final = "order"
"""Name, within the matrix that gets it, of the order in which a norm writes its channels."""
FLOAT_WEIGHT: Final = "weight"
"""Name of the weight of a matrix that is not packed."""
SERVED_SITES: Final = ("norm", "attention", "hidden")
"""Fields of `ActivationSpec` whose roundings are served: those of the inputs of matrices."""
ROUNDED_UNSERVED: Final = frozenset({"bloom", "gpt2"})
"""Model types that vLLM serves only where activations are not rounded."""
UNSERVED_LAYOUT: Final = "ggml"
"""The layout whose grids no part of the plugin cuts or joins."""
SCRAMBLED: Final = {"bloom": "query_key_value"}
"""Matrices, by model type, whose rows vLLM rearranges while it reads them: in every tensor of the
matrix, whatever it holds, so that packed ones are destroyed."""


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix of the files.

    Attributes:
        name: of its layer in the files.
        layout: name of its packed layout; empty if it is not packed.
        spec: bits and groups; ``None`` if it is not packed.
        shape: ``(out, in)``.
        dtypes: what the files hold of it, by name within the layer (``codes``, ``weight``,
            ``inputs.scale``), each with its dtype as safetensors spells it.
    """

    name: str
    layout: str
    spec: QuantSpec | None
    shape: tuple[int, int]
    dtypes: Mapping[str, str] = field(default_factory=dict)

    @property
    def stores_order(self) -> bool:
        """Whether its columns are stored in another order than the inputs'."""
        return "in_perm" in self.dtypes


@dataclass(frozen=True)
class Stored:
    """A quantized directory: its matrices, and how activations are rounded.

    Attributes:
        matrices: the packed ones, by the name of their layer in vLLM.
        arithmetic: of products on the CPU, see `quantine.kernels.matrix`.
        activations: how they are rounded; ``None`` where they are not.
        family: the model's architecture; ``None`` until the files are known.
        files: dtype and shape of every tensor in the files, by name in vLLM.
    """

    matrices: Mapping[str, StoredMatrix]
    arithmetic: Arithmetic
    activations: ActivationSpec | None
    family: Family | None = None
    files: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Stored:
        """Read the ``quantization_config`` of ``config.json``.

        Raises:
            FormatError: docs/format.md does not allow it.
            PlanError: activations are rounded where vLLM computes by itself, or matrices are in
                blocks of ggml's.
        """
        check_description(settings)
        schemes = settings["schemes"]
        matrices = {}
        for name, layer in settings["layers"].items():
            scheme = schemes[layer["scheme"]]
            if scheme["format"] == UNSERVED_LAYOUT:
                raise PlanError(
                    f"{cut(name)} was solved for llama.cpp, and is not served by vLLM: export --to "
                    "gguf, or quantize without --target llama.cpp"
                )
            rows, columns = layer["shape"]
            matrices[name] = StoredMatrix(name, scheme["format"], spec_of(scheme), (rows, columns))
        activations = settings.get("activations")
        spec = None if activations is None else activations_from(activations, "config.json")
        if spec is not None:
            _check_sites(spec)
        return cls(matrices, settings.get("arithmetic", UNSTATED), spec)

    def with_files(
        self, model_type: str, files: Mapping[str, tuple[str, tuple[int, ...]]]
    ) -> Stored:
        """Add what the headers of the files say.

        Args:
            model_type: of ``config.json``.
            files: dtype and shape of every tensor, by name.

        Raises:
            FormatError: a matrix lacks a tensor.
            PlanError: vLLM cannot read a matrix, or compute the model.
        """
        if model_type in VLLM_UNSERVED:
            reason = VLLM_UNSERVED[model_type]
            raise PlanError(f"{model_type} is not served: vLLM's own model {reason}")
        family = described_family(model_type)
        # Without described links it is not known which of vLLM's modules read what is rounded.
        unserved = model_type in ROUNDED_UNSERVED or not family.links
        if self.activations is not None and unserved:
            raise PlanError(
                f"rounded activations of {model_type} models are not served by vLLM yet: quantize "
                "with W4A16"
            )
        found = {}
        for name, matrix in self.matrices.items():
            assert matrix.spec is not None
            required = format_named(matrix.layout).required(matrix.spec, *matrix.shape)
            missing = [f"{name}.{key}" for key in required if f"{name}.{key}" not in files]
            if missing:
                raise FormatError(f"no file holds {listed(missing)}: the directory is damaged")
            if SCRAMBLED.get(model_type, "\0") in name:
                raise PlanError(
                    f"vLLM rearranges {name} of {model_type} models while it reads it, as if it "
                    "were floats: keep these matrices in floats for vLLM, by a rule with keep"
                )
            found[name] = matrix
        return replace(self, matrices=found, family=family, files=dict(files))

    def renamed(self, rename: Callable[[str], str | None]) -> Stored:
        """With the names that vLLM's model has for the modules of the files."""

        def names(of: Mapping[str, Any]) -> dict[str, Any]:
            return {rename(name) or name: value for name, value in of.items()}

        return replace(self, matrices=names(self.matrices), files=names(self.files))

    def matrix(self, name: str) -> StoredMatrix | None:
        """The matrix of the layer that vLLM calls ``name``, packed or not; ``None`` if none is."""
        packed, weight = self.matrices.get(name), self.files.get(f"{name}.{FLOAT_WEIGHT}")
        if packed is None and (weight is None or len(weight[1]) != 2):
            return None
        if packed is None:
            assert weight is not None
            packed = StoredMatrix(name, "", None, (weight[1][0], weight[1][1]))
        keys = [FLOAT_WEIGHT] if packed.spec is None else format_named(packed.layout).tensor_names
        rounded = [f"{INPUTS_NAME}.{key}" for key in ("scale", "zero", "labels", "reach")]
        dtypes = {
            key: self.files[f"{name}.{key}"][0]
            for key in (*keys, *rounded)
            if f"{name}.{key}" in self.files
        }
        order = self.files.get(self._orders().get(name, ""))
        if order is not None:
            dtypes[ORDER] = order[0]
        return replace(packed, dtypes=dtypes)

    def fused(self, name: str, parts: Mapping[str, Sequence[str]]) -> list[StoredMatrix]:
        """The matrices of the layer that vLLM calls ``name``: itself, or those fused into it.

        Args:
            parts: for the last part of the name of a fused layer, those of its matrices.

        Returns:
            Nothing if the files hold none of them.

        Raises:
            FormatError: they hold some only.
        """
        found = self.matrix(name)
        if found is not None:
            return [found]
        parent, _, leaf = name.rpartition(".")
        names = [f"{parent}.{part}" for part in parts.get(leaf, ())]
        several = [self.matrix(part) for part in names]
        lacking = [part for part, one in zip(names, several, strict=True) if one is None]
        if names and len(lacking) == len(names):
            return []
        if lacking:
            raise FormatError(f"no file holds {listed(lacking)}, which vLLM needs for {name}")
        return [one for one in several if one is not None]

    def bits_of_inputs(self, name: str) -> int:
        """Bits to which the input of a matrix is rounded; `UNQUANTIZED` where it is not."""
        if self.activations is None or self.family is None:
            return UNQUANTIZED
        for link in self.family.links:
            if any(name.endswith(f".{path}") for path in link.consumers):
                site = CONSUMED.get(link.kind)
                if site is not None:
                    return int(getattr(self.activations, site))
        return UNQUANTIZED

    def renamings(self) -> dict[re.Pattern[str], str | None]:
        """How names in the files are changed before vLLM looks for them; ``None``: passed over.

        Orders of norms become tensors of the matrices that read them, and vLLM's norms are as in
        models that are not reordered. What has the name of a layer, or of a reorder, is a picture
        of it, from quantine_maps.safetensors: vLLM reads every such file.
        """
        names = {*self.matrices, *(matrix.name for matrix in self.matrices.values())}
        pictures = "|".join(re.escape(name) for name in sorted(names))
        clusters = "|".join(REORDERS)
        dropped = (f"^(?:{pictures})$", rf"\.(?:{clusters})$")
        found: dict[re.Pattern[str], str | None] = {re.compile(name): None for name in dropped}
        for norm, consumer in self._gathers():
            path = rf"\.{re.escape(norm)}\."
            found[re.compile(rf"{path}{ORDER}$")] = f".{consumer}.{ORDER}"
            found[re.compile(rf"{path}norm\.(weight|bias)$")] = rf".{norm}.\1"
        return found

    def _orders(self) -> dict[str, str]:
        """Name of the stored order of each matrix that gets one, by name of the matrix."""
        return {
            f"{name.removesuffix(f'.{norm}.{ORDER}')}.{consumer}": name
            for norm, consumer in self._gathers()
            for name in self.files
            if name.endswith(f".{norm}.{ORDER}")
        }

    def _gathers(self) -> Iterator[tuple[str, str]]:
        """Paths of norms that write reordered channels, and of the first matrix that reads them."""
        if self.family is not None and self.activations is not None:
            for link in self.family.links:
                if link.fold == "gather":
                    yield from ((norm, link.consumers[0]) for norm in link.producers)


def _check_sites(spec: ActivationSpec) -> None:
    rounded = [s for s in SITES if s not in SERVED_SITES and getattr(spec, s) != UNQUANTIZED]
    if rounded:
        raise PlanError(
            f"vLLM computes attention itself, so the rounding of {', '.join(rounded)} is not "
            f"served, nor a packed cache: set {', '.join(f'{site}: 16' for site in rounded)} in "
            f"activations; {', '.join(SERVED_SITES)} are served"
        )
    if spec.rotated:
        raise PlanError(
            f"activations of {', '.join(spec.rotated)} are rotated before they are rounded, which "
            "is not served by vLLM yet: quantize without rotated"
        )


def missing_claims(stored: Stored, claimed: set[str], model: str) -> None:
    """Refuse packed matrices for which vLLM's model has asked no quantization method.

    Args:
        claimed: names of the matrices for which it has.
        model: what to call the model in the error.

    Raises:
        PlanError: names them.
    """
    left = sorted(set(stored.matrices) - claimed)
    if left:
        raise PlanError(
            f"vLLM's {cut(model)} holds {listed(left)} in floats only: keep them in floats, by a "
            "rule with keep, and quantize again"
        )
