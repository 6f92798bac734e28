"""`ActivationSpec`, which says how activations are to be quantized, and choices for its fields."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final, Literal

from quantine.core.spec import MAX_BITS, MIN_BITS, check_choice
from quantine.errors import PlanError, shown

Granularity = Literal["cluster", "tensor", "token"]
"""Name of a way to share grids between values, one of `GRANULARITIES`."""
GRANULARITIES: Final[tuple[Granularity, ...]] = ("cluster", "tensor", "token")
"""Values of `ActivationSpec.granularity`. ``"cluster"``: channels are reordered into clusters of
alike ranges, and each cluster has a static grid (RPTQ, arXiv 2304.01089). ``"tensor"``: the whole
tensor has one static grid. ``"token"``: each token gets its own grid, which is computed while the
model runs. A static grid is found once, during calibration."""
Range = Literal["search", "running", "minmax"]
"""Name of a way to find the range of a static grid, one of `RANGES`."""
RANGES: Final[tuple[Range, ...]] = ("search", "running", "minmax")
"""Values of `ActivationSpec.range`: how calibration finds the range of a static grid. ``"minmax"``:
from the smallest to the largest value in the calibration text. ``"running"``: a running average of
that over the calibration samples, divided into ``2**bits`` steps instead of ``2**bits - 1`` as in
RPTQ's published code. ``"search"``: several ranges are tried at each site, and the one that changes
the block's output least is taken."""

UNQUANTIZED: Final = 16
"""Number of bits that stands for "not quantized" in an `ActivationSpec`."""
SITES: Final = ("norm", "query", "key", "value", "attention", "hidden", "softmax")
"""Names of the places in a decoder block where activations are rounded, each explained in
`ActivationSpec`."""
REORDERS: Final = ("R1", "R2", "R3", "R4", "R5")
"""Names of the five channel reorders of RPTQ, in the order of `ActivationSpec.clusters`."""
CONSUMED: Final = {"R1": "norm", "R3": "attention", "R4": "norm", "R5": "hidden"}
"""For each reorder the site that matrices read, if any."""
INPUT_SITES: Final = ("norm", "attention", "hidden")
"""The sites that matrices read."""
ROTATABLE: Final = (*INPUT_SITES, "value")
"""The sites whose channels may be rotated before they are rounded."""
FINE_BITS: Final = 8
"""Number of bits from which on a range is not searched for: steps are then so small that the search
finds nothing better, and ranges get a margin instead."""
SITES_WITH_FACTORS: Final = ("attention", "hidden")
"""Sites at which the magnitudes of tokens differ most. At `FINE_BITS` bits or more, with range
``"search"``, each token is divided by a factor of its own before it is rounded there."""
PER_CHANNEL: Final = 256
"""Number of clusters per attention head that gives every channel a grid of its own: at least the
number of channels of a head."""
DEFAULT_CLUSTERS: Final = (32, PER_CHANNEL, 4, 32, 32)
"""Default numbers of clusters for the reorders R1 to R5. Queries and keys (R2) have a grid per
channel: they are multiplied channel by channel and no packed matrix reads them, so more clusters
cost only their scales."""


@dataclass(frozen=True)
class ActivationSpec:
    """How the activations of every decoder block are to be quantized.

    A number of bits is 2 to 8, or 16 for a site that is not quantized.

    Attributes:
        norm: bits of the outputs of norms, which are the inputs of the q, k and v projections and
            of the first matrices of the MLP.
        query, key, value: bits of the queries, keys and values that attention computes with.
        attention: bits of the input of attention's output projection.
        hidden: bits of the input of the last matrix of the MLP.
        softmax: bits of attention probabilities, on a fixed grid from 0 to 1.
        relative: whether each attention probability is divided by the largest one of its query
            before it is rounded. ``False`` rounds the probability itself, as RPTQ's published code
            does.
        granularity: which values share a grid, see `GRANULARITIES`.
        range: how the range of a static grid is found, see `RANGES`.
        clusters: numbers of clusters for the reorders R1 (norm before attention), R2 (queries and
            keys), R3 (values), R4 (norm before the MLP) and R5 (hidden). For R2 and R3 they count
            per head.
        value_clusters: number of grids per head on which values are rounded for attention. ``None``
            uses the clusters of R3.
        token_factors: whether inputs of matrices may be divided by a factor per token before they
            are rounded, see `quantine.kernels.integer.token_factors`.
        rotated: those of `ROTATABLE` whose channels are rotated before they are rounded. Inputs of
            matrices are rotated while the model runs, see `quantine.activations.rotated_inputs`.
            There is nothing to cluster then, and their reorders have one cluster (R3 for each head,
            which values then share unless `value_clusters` says otherwise). Values are rotated by
            their weights, see `quantine.activations.rotated_values`, in the blocks where that
            pays; each token of a head has a factor then.
        mixed_keys: whether channels of keys may have different numbers of bits, with `key` as the
            mean of a head, see `quantine.rptq.widths`.
        centred_keys: whether keys are rounded less a centre that turns with the position of the
            token, as rotary embeddings do, see `quantine.kernels.kv_attention.key_centre`.

    Raises:
        PlanError: a field has a value that is not allowed.
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
    rotated: tuple[str, ...] = ()
    mixed_keys: bool = False
    centred_keys: bool = False

    def __post_init__(self) -> None:
        for site in SITES:
            bits = getattr(self, site)
            if not _is_whole(bits) or not (MIN_BITS <= bits <= MAX_BITS or bits == UNQUANTIZED):
                raise PlanError(
                    f"activations: {site} must be {MIN_BITS} to {MAX_BITS} bits, or {UNQUANTIZED} "
                    f"for none, not {shown(bits)}"
                )
        for name in ("relative", "token_factors", "mixed_keys", "centred_keys"):
            if not isinstance(getattr(self, name), bool):
                raise PlanError(
                    f"activations: {name} must be true or false, not {shown(getattr(self, name))}"
                )
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("range", self.range, RANGES)
        if len(self.clusters) != len(REORDERS) or not all(
            _is_whole(n) and n > 0 for n in self.clusters
        ):
            raise PlanError(
                f"activations: clusters must be {len(REORDERS)} positive numbers, for "
                f"{', '.join(REORDERS)}, not {shown(self.clusters)}"
            )
        self._check_rotated()
        self._check_mixed_keys()
        if self.centred_keys and (self.key == UNQUANTIZED or not self.reorders):
            raise PlanError(
                "activations: centred_keys needs keys that are rounded, with granularity cluster, "
                f"not {self.key} bits and {self.granularity}: leave it out"
            )
        count = self.value_clusters
        if count is not None and not (_is_whole(count) and count > 0):
            raise PlanError(
                "activations: value_clusters must be a positive number, or null, not "
                f"{shown(count)}"
            )

    def _check_rotated(self) -> None:
        sites = self.rotated
        known = isinstance(sites, tuple) and all(site in ROTATABLE for site in sites)
        if not known or len(set(sites)) < len(sites):
            raise PlanError(
                f"activations: rotated must list some of {', '.join(ROTATABLE)}, each once, not "
                f"{shown(sites)}"
            )
        if sites and not self.reorders:
            raise PlanError(
                f"activations: granularity {self.granularity} does not go with rotated: leave out "
                "one of them"
            )
        for site in sites:
            if getattr(self, site) == UNQUANTIZED:
                raise PlanError(
                    f"activations: {site} cannot be rotated, as it is not rounded: give it fewer "
                    "bits, or do not rotate it"
                )

        if self.rotates("value") and (self.value >= FINE_BITS or not self._is_searched):
            raise PlanError(
                f"activations: value can be rotated with fewer than {FINE_BITS} bits, range search "
                f"and token_factors, not with {self.value} bits, range {self.range} and "
                f"token_factors {self.token_factors}: leave it out of rotated"
            )

    @property
    def _is_searched(self) -> bool:
        return self.range == "search" and self.token_factors

    def _check_mixed_keys(self) -> None:
        if not self.mixed_keys:
            return
        if self.key >= FINE_BITS:
            raise PlanError(
                f"activations: mixed_keys needs keys of fewer than {FINE_BITS} bits, not "
                f"{self.key}: give key fewer, or leave it out"
            )
        if not self.reorders or self.range != "search":
            raise PlanError(
                "activations: mixed_keys goes with granularity cluster and range search, not with "
                f"{self.granularity} and {self.range}: leave it out"
            )

    @property
    def reorders(self) -> bool:
        """Whether channels are reordered, so that those of one cluster are neighbours."""
        return self.granularity == "cluster"

    @property
    def searches(self) -> bool:
        """Whether at least one site gets its grid from the search described at `RANGES`."""
        static = self.range == "search" and self.granularity != "token"
        sites = [site for site in SITES if site != "softmax"]
        return static and any(getattr(self, site) < FINE_BITS for site in sites)

    def clusters_of(self, kind: str) -> int:
        """Number of clusters of reorder ``kind`` in `REORDERS`; 1 where nothing is reordered."""
        plain = not self.reorders or self.rotates(CONSUMED.get(kind, ""))
        return 1 if plain else self.clusters[REORDERS.index(kind)]

    def rotates(self, site: str) -> bool:
        """Whether the channels of ``site`` are rotated before they are rounded."""
        return site in self.rotated

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold; `activations_from` turns them back.

        What earlier versions do not know is left out where it says nothing.
        """
        found = {**dataclasses.asdict(self), "clusters": list(self.clusters)}
        later = {name: found.pop(name) for name in ("rotated", "mixed_keys", "centred_keys")}
        later["rotated"] = list(later["rotated"])
        return {**found, **{name: value for name, value in later.items() if value}}


def activations_from(value: Any, where: str) -> ActivationSpec:
    """Build an `ActivationSpec` from plain values, such as those read from a plan file.

    Args:
        value: a mapping from field names of `ActivationSpec` to their values.
        where: the place of ``value`` in the plan, named in errors.

    Raises:
        PlanError: an unknown key, or a value that is not allowed.
    """
    names = [field.name for field in dataclasses.fields(ActivationSpec)]
    if not isinstance(value, dict) or (set(value) - set(names)):
        raise PlanError(
            f"{where}: activations must be a mapping with keys among {', '.join(names)}"
        )
    fields = dict(value)
    for name in fields.keys() & {"clusters", "rotated"}:
        if not isinstance(fields[name], list | tuple):
            raise PlanError(f"{where}: {name} must be a list, not {shown(fields[name])}")
        fields[name] = tuple(fields[name])
    try:
        return ActivationSpec(**fields)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
