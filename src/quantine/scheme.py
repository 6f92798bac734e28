"""A scheme: how one matrix is quantized, as a value and as plain values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_type_hints

from quantine.core.spec import CLUSTERS, FLOAT16, GROUP_AXES, QuantSpec, check_choice
from quantine.errors import PlanError
from quantine.families.base import Layer
from quantine.formats import FORMATS, format_named
from quantine.methods import METHODS, Solver
from quantine.methods.spqr import LARGEST_SHARE, SpQR

Objective = Literal["output", "hessian"]
OBJECTIVES: Final[tuple[Objective, ...]] = ("output", "hessian")
"""What a choice between schemes compares.

``"output"``: rounded to nearest, how much a scheme changes the output of what the matrix is part
of; see `quantine.adadim`. ``"hessian"``: solved, how much it changes the matrix's own output,
``tr(D H D.T)``.
"""
ADADIM: Final = "adadim"
"""The method of a rule that lets each layer choose."""
KEEP: Final = "keep"
"""The method of a rule that leaves its layers in 16 bit."""
SPQR: Final = "spqr"
"""The format whose directories hold nothing else, because other programs read them."""
INFINITE: Final = "inf"
"""How plans write an infinite number."""
AVERAGE: Final = "average_bits"
SHARE_STEPS: Final = 40
"""Bisections that find a share of outliers to the last outlier of any matrix."""


@dataclass(frozen=True)
class Scheme:
    """How one matrix is quantized: solver, weight request, and packed layout.

    Attributes:
        average_bits: of `SpQR`: packed bits per weight that outliers fill up. How many that are
            differs from layer to layer, see `settled`; it is met as closely as the solver meets
            a share of outliers, within some percent of them. Zero leaves it to the solver.
    """

    solver: Solver
    spec: QuantSpec
    format: str = "dense"
    average_bits: float = 0.0

    def __post_init__(self) -> None:
        if not self.average_bits:
            return
        if not isinstance(self.solver, SpQR) or self.solver.outliers:
            raise PlanError(f"{AVERAGE} is for method spqr without `outliers`, which would decide")
        if not 0 < self.average_bits <= FLOAT16:
            raise PlanError(
                f"{AVERAGE} must be above 0 and at most {FLOAT16}, not {self.average_bits!r}"
            )

    @property
    def method(self) -> str:
        """The solver's name in `METHODS`."""
        return next(name for name, kind in METHODS.items() if type(self.solver) is kind)

    def as_dict(self) -> dict[str, Any]:
        """Everything about the scheme, as plain values; `scheme_from` inverts it."""
        spec = dataclasses.asdict(self.spec)
        if not self.spec.cluster_sizes:
            del spec["cluster_sizes"]
        return {
            "method": self.method,
            **spec,
            **{name: _plain(item) for name, item in dataclasses.asdict(self.solver).items()},  # type: ignore[call-overload]
            "format": self.format,
            **({AVERAGE: self.average_bits} if self.average_bits else {}),
        }

    def settled(self, layer: Layer) -> Scheme:
        """The scheme for ``layer``: with the share of outliers that ``average_bits`` has room for.

        Raises:
            PlanError: the layer takes more bits even without outliers, or so few that more than
                `LARGEST_SHARE` of its weights would be outliers.
        """
        if not self.average_bits or not self.tiles(layer):
            return self
        room = layer.weights * self.average_bits / 8
        dense, fullest = (self._keeping(share).nbytes(layer) for share in (0.0, LARGEST_SHARE))
        if not dense <= room <= fullest:
            raise PlanError(
                f"{layer.name}: {AVERAGE} must be from {dense * 8 / layer.weights:.3f} (no "
                f"outliers) to {fullest * 8 / layer.weights:.3f} with these bits and groups, not "
                f"{self.average_bits:g}"
            )
        low, high = 0.0, LARGEST_SHARE
        for _ in range(SHARE_STEPS):
            share = (low + high) / 2
            low, high = (
                (share, high) if self._keeping(share).nbytes(layer) <= room else (low, share)
            )
        return self._keeping(low)

    def _keeping(self, share: float) -> Scheme:
        assert isinstance(self.solver, SpQR)
        threshold = self.solver.threshold if share else math.inf
        solver = dataclasses.replace(self.solver, outliers=share, threshold=threshold)
        return dataclasses.replace(self, solver=solver, average_bits=0.0)

    def tiles(self, layer: Layer) -> bool:
        """Whether groups tile the lines of ``layer`` exactly."""
        return self.spec.divides(self.spec.lines(layer.out_features, layer.in_features)[1])

    def nbytes(self, layer: Layer) -> int:
        """Packed bytes of ``layer``; outliers that a threshold decides about come on top."""
        return format_named(self.format).nbytes(
            self.spec,
            layer.out_features,
            layer.in_features,
            self.solver.stores_order(self.spec),
            self.solver.outlier_share or 0.0,
        )


@dataclass(frozen=True)
class AdaDim:
    """One of several schemes for each matrix: the one with the least reconstruction loss.

    AdaDim (arXiv 2309.15531, section 3.2) chooses the axis that groups run along. Here choices may
    differ in anything; where they take different bytes, the largest mostly wins: use a budget.

    Attributes:
        choices: at least one; of equals the first is taken.
        objective: what is compared, see `OBJECTIVES`.
    """

    choices: tuple[Scheme, ...]
    objective: Objective = "output"

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        if not self.choices:
            raise PlanError("choices must not be empty")

    def as_dict(self) -> dict[str, Any]:
        """Plain values; `adadim_from` inverts it."""
        choices = [choice.as_dict() for choice in self.choices]
        return {"method": ADADIM, "objective": self.objective, "choices": choices}


def adadim_from(value: Mapping[str, Any], where: str) -> AdaDim:
    """A choice from plain values.

    Args:
        value: ``inner``, the method of all choices; ``choices``, a list of mappings, by default one
            for each group axis; ``objective``; and fields that all choices have in common.

    Raises:
        PlanError: as of `scheme_from`.
    """
    own = ("method", "inner", "choices", "objective")
    common = {key: item for key, item in value.items() if key not in own}
    if "inner" in value:
        common["method"] = value["inner"]
    elif "choices" not in value:
        raise PlanError(f"{where}: {ADADIM} needs `inner`, one of {', '.join(METHODS)}")
    listed = value.get("choices", [{"group_axis": axis} for axis in GROUP_AXES])
    if not isinstance(listed, list) or not all(isinstance(one, Mapping) for one in listed):
        raise PlanError(f"{where}: choices must be a list of mappings")
    schemes = [
        scheme_from({**common, **one}, f"choice {number} of {where}")
        for number, one in enumerate(listed, 1)
    ]
    if any(scheme is None or scheme.format == SPQR for scheme in schemes):
        raise PlanError(f"{where}: neither method {KEEP!r} nor format {SPQR!r} is a choice")
    try:
        return AdaDim(
            tuple(scheme for scheme in schemes if scheme is not None),
            value.get("objective", "output"),
        )
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error


def scheme_from(value: Mapping[str, Any], where: str) -> Scheme | None:
    """A scheme from plain values: ``method``, and fields of its solver and of `QuantSpec`.

    Raises:
        PlanError: says what is wrong, ``where``, and what would be right.
    """
    method = value.get("method")
    fields = {key: item for key, item in value.items() if key not in {"method", "format"}}
    if method == KEEP:
        if fields or "format" in value:
            raise PlanError(f"{where}: method {KEEP!r} takes no parameters")
        return None
    if not isinstance(method, str) or method not in METHODS:
        raise PlanError(
            f"{where}: method must be one of {', '.join([*METHODS, KEEP])}, not {method!r}"
        )
    kind = METHODS[method]
    spec_types, solver_types = _field_types(QuantSpec), _field_types(kind)
    types = {**spec_types, **solver_types, **({AVERAGE: float} if kind is SpQR else {})}
    _check_types(fields, types, method, where)
    try:
        asked = {k: v for k, v in fields.items() if k in spec_types}
        if "cluster_sizes" in asked:
            asked["cluster_sizes"] = tuple(asked["cluster_sizes"])
        spec = dataclasses.replace(kind.default_spec, **asked)
        solver = kind(**{k: _special(v) for k, v in fields.items() if k in solver_types})
        if spec.clustered and not solver.takes_clusters:
            raise PlanError(
                f"{method} with these parameters cannot make groups of clusters (group_size "
                f"{CLUSTERS}): give a group_size, or use gptq or rtn"
            )
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
    average = float(_special(fields.get(AVERAGE, 0.0)))
    keeps = bool(average) or solver.outlier_share != 0
    fitting = [name for name, layout in FORMATS.items() if layout.supports(spec, keeps)]
    layout = value.get("format", fitting[0])
    if not isinstance(layout, str) or layout not in FORMATS:
        raise PlanError(f"{where}: format must be one of {', '.join(FORMATS)}, not {layout!r}")
    if layout not in fitting:
        raise PlanError(
            f"{where}: format {layout!r} cannot hold what is asked for; {fitting[0]!r} can"
        )
    try:
        return Scheme(solver, spec, layout, average)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error


def _check_types(
    fields: Mapping[str, Any], types: Mapping[str, Any], method: str, where: str
) -> None:
    for key, item in fields.items():
        expected = types.get(key)
        if expected is None:
            known = ", ".join(types)
            raise PlanError(f"{where}: {method} has no parameter {key!r} (it has {known})")
        if expected in {int, float, bool} and not is_a(item, expected):
            raise PlanError(f"{where}: {key} must be {expected.__name__}, not {item!r}")


def _plain(item: object) -> object:
    """``item`` as JSON has it, which knows no infinity."""
    return INFINITE if item == math.inf else item


def _special(item: Any) -> Any:
    """Invert `_plain`, and read what YAML takes for text: ``1e-3``, ``1%``."""
    number = _number(item) if isinstance(item, str) else None
    return item if number is None else number


def _number(text: str) -> float | None:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _field_types(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def is_a(item: object, kind: type) -> bool:
    """Whether a plain value has type ``kind``: whole numbers are floats, booleans no numbers."""
    if kind is float and isinstance(item, str):
        return _number(item) is not None
    if kind is bool or isinstance(item, bool):
        return kind is bool and isinstance(item, bool)
    return isinstance(item, (int, float) if kind is float else kind)
