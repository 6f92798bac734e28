"""What is asked of activations, and the schemes of the literature by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final, Literal

from quantine.core.spec import MAX_BITS, MIN_BITS, check_choice
from quantine.errors import PlanError

Granularity = Literal["cluster", "tensor", "token"]
GRANULARITIES: Final[tuple[Granularity, ...]] = ("cluster", "tensor", "token")
"""``"cluster"``: channels are reordered, each cluster of them has a static grid (RPTQ, arXiv
2304.01089). ``"tensor"``: one static grid. ``"token"``: one grid for each token, found when it
comes."""
Range = Literal["search", "running", "minmax"]
RANGES: Final[tuple[Range, ...]] = ("search", "running", "minmax")
"""How the range of a static grid is found. ``"minmax"``: everything the calibration text showed.
``"running"``: the running average over its samples, with the wasted step of RPTQ's published code.
``"search"``: of several ranges, site by site, the one that changes the block's output least."""

UNQUANTIZED: Final = 16
"""Bits of a site whose values stay as they are."""
SITES: Final = ("norm", "query", "key", "value", "attention", "hidden", "softmax")
"""Where activations are rounded: see `ActivationSpec`."""
REORDERS: Final = ("R1", "R2", "R3", "R4", "R5")
"""The reorders of RPTQ, in the order of `ActivationSpec.clusters`."""
FINE_BITS: Final = 8
"""Bits from which on steps are so small that a search finds nothing: ranges get a margin."""
SITES_WITH_FACTORS: Final = ("attention", "hidden")
"""Sites whose tokens differ most in how loud they are: from `FINE_BITS` bits on, they have factors."""
PER_CHANNEL: Final = 256
"""As many clusters as a head has channels, or more."""
DEFAULT_CLUSTERS: Final = (32, PER_CHANNEL, 4, 32, 32)
"""Those of schemes that are not faithful: queries and keys meet channel by channel, no matrix
reads them, so that more clusters cost nothing but their scales."""


@dataclass(frozen=True)
class ActivationSpec:
    """A request for the activations of every decoder block; bits are 2 to 8, or 16 for none.

    Attributes:
        norm: bits of what norms put out, the inputs of q, k, v and of the first matrices of the
            MLP.
        query, key, value: bits of what attention works on.
        attention: bits of the input of attention's output projection.
        hidden: bits of the input of the last matrix of the MLP.
        softmax: bits of attention probabilities, on a fixed grid from 0 to 1.
        relative: what is rounded of probabilities is their ratio to the largest of a query;
            otherwise they themselves are, as in RPTQ's published code.
        granularity: see `GRANULARITIES`.
        range: see `RANGES`.
        clusters: of the reorders R1 to R5 (norm before attention; queries and keys; values; norm
            before the MLP; hidden); those of R2 and R3 count for each head.
        value_clusters: grids of values for each head; ``None`` for those of R3.
        token_factors: inputs of matrices may be divided by a factor for each token before they meet
            the grids of their clusters, see `quantine.kernels.integer.token_factors`.
    """

    norm: int = UNQUANTIZED
    query: int = UNQUANTIZED
    key: int = UNQUANTIZED
    value: int = UNQUANTIZED
    attention: int = UNQUANTIZED
    hidden: int = UNQUANTIZED
    softmax: int = UNQUANTIZED
    relative: bool = True
    granularity: Granularity = "cluster"
    range: Range = "search"
    clusters: tuple[int, ...] = DEFAULT_CLUSTERS
    value_clusters: int | None = PER_CHANNEL
    token_factors: bool = True

    def __post_init__(self) -> None:
        for site in SITES:
            bits = getattr(self, site)
            if not _is_whole(bits) or not (MIN_BITS <= bits <= MAX_BITS or bits == UNQUANTIZED):
                raise PlanError(
                    f"activations: {site} must be {MIN_BITS} to {MAX_BITS} bits, or {UNQUANTIZED} "
                    f"for none, not {bits!r}"
                )
        for name in ("relative", "token_factors"):
            if not isinstance(getattr(self, name), bool):
                raise PlanError(
                    f"activations: {name} must be true or false, not {getattr(self, name)!r}"
                )
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("range", self.range, RANGES)
        if len(self.clusters) != len(REORDERS) or not all(
            _is_whole(n) and n > 0 for n in self.clusters
        ):
            raise PlanError(
                f"activations: clusters must be {len(REORDERS)} positive numbers, for "
                f"{', '.join(REORDERS)}, not {self.clusters!r}"
            )
        count = self.value_clusters
        if count is not None and not (_is_whole(count) and count > 0):
            raise PlanError(
                f"activations: value_clusters must be a positive number, or null, not {count!r}"
            )

    @property
    def reorders(self) -> bool:
        """Whether channels are put in the order of their clusters."""
        return self.granularity == "cluster"

    @property
    def searches(self) -> bool:
        """Whether grids are searched for at some site."""
        static = self.range == "search" and self.granularity != "token"
        sites = [site for site in SITES if site != "softmax"]
        return static and any(getattr(self, site) < FINE_BITS for site in sites)

    def clusters_of(self, kind: str) -> int:
        """Clusters of a reorder in `REORDERS`; one, where nothing is reordered."""
        return self.clusters[REORDERS.index(kind)] if self.reorders else 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values; `activations_from` inverts it."""
        return {**dataclasses.asdict(self), "clusters": list(self.clusters)}


def activations_from(value: Any, where: str) -> ActivationSpec:
    """A request from plain values.

    Raises:
        PlanError: says what is wrong and ``where``.
    """
    names = [field.name for field in dataclasses.fields(ActivationSpec)]
    if not isinstance(value, dict) or (set(value) - set(names)):
        raise PlanError(
            f"{where}: activations must be a mapping with keys among {', '.join(names)}"
        )
    fields = dict(value)
    if "clusters" in fields:
        if not isinstance(fields["clusters"], list | tuple):
            raise PlanError(f"{where}: clusters must be a list, not {fields['clusters']!r}")
        fields["clusters"] = tuple(fields["clusters"])
    try:
        return ActivationSpec(**fields)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
