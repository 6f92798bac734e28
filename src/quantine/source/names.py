"""What a model calls the tensors in weight files; the rules are those of transformers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from quantine.source.pieces import Join, Piece, piece_stored_as, pieces_of, there_twice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPUTED: Final = re.compile(
    r"\brotary_emb\.(inv_freq|cos_cached|sin_cached)$|\b(attn|attention)\.masked_bias$"
    r"|\bdecoder\.version$"
)
"""Tensors that older versions of transformers stored, and that every model computes by itself."""


@dataclass(frozen=True)
class Names:
    """Which stored tensor is which of the model's.

    Attributes:
        stored: names in the files, by the model's names. Both names of a tied tensor are there.
        pieces: what of the stored tensor each is, by the model's names; those of tensors that are
            stored alone are missing.
        joined: all stored tensors that one of the model's is made of, one after the other along the
            first dimension, by its name; ``stored`` has the first of them.
        unused: names in the files for which the model has no use.
    """

    stored: dict[str, str]
    pieces: dict[str, Piece]
    joined: dict[str, tuple[str, ...]]
    unused: tuple[str, ...]


def match_names(model: PreTrainedModel, found: Iterable[str]) -> Names:
    """Find the tensors of ``model`` among those that files hold.

    Args:
        model: only its names and settings matter; weights may be on the meta device.
        found: all names in the files.

    Raises:
        CheckpointError: files hold a tensor twice, or in another layout than the model's.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    tensors, larger, prefix = model.state_dict(), pieces_of(model), model.base_model_prefix
    known = {**tensors, **dict.fromkeys(larger, model)}
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    conversions = [change for change in changes if isinstance(change, WeightConverter)]
    stored: dict[str, str] = {}
    pieces: dict[str, Piece] = {}
    joins: dict[str, Join] = {}
    unused = []
    for old in sorted(found):
        name, converted = rename_source_key(old, renamings, conversions, prefix, known)
        if converted is not None and name in larger:
            converter = next(one for one in conversions if converted in one.source_patterns)
            name, converted = piece_stored_as(old, converted, converter, larger[name]), None
            if name not in tensors:  # it is in the larger tensor, but no part of the model
                continue
        elif name not in known and old in known:
            name, converted = old, None
        if name not in known:
            unused.append(old)
            continue
        if converted is not None:
            converter = next(one for one in conversions if converted in one.source_patterns)
            joins.setdefault(name, Join(name, converter)).add(old, converted)
            continue
        parts = larger.get(name, {})
        pieces.update(parts)
        for part in parts or [name]:
            if part in stored:
                raise there_twice(part, stored[part], old)
            stored[part] = old
    joined = {name: join.parts() for name, join in joins.items()}
    for name in joined.keys() & stored.keys():
        raise there_twice(name, stored[name], joined[name][0])
    stored |= {name: parts[0] for name, parts in joined.items()}
    for target, source in model.all_tied_weights_keys.items():
        for name, other in ((target, source), (source, target)):
            if name not in stored and other in stored:
                stored[name] = stored[other]
    return Names(stored, pieces, joined, tuple(not_understood(model, unused)))


def not_understood(model: PreTrainedModel, unused: Collection[str]) -> list[str]:
    """Those of ``unused`` that neither transformers nor `COMPUTED` declares to be superfluous."""
    from transformers.utils.loading_report import LoadStateDictInfo

    info = LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(unused),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)
    return sorted(name for name in info.unexpected_keys if not COMPUTED.search(name))


def listed(names: Sequence[str]) -> str:
    """The first names, for a message, and how many there are if that is more.

    Args:
        names: at least one.
    """
    first = ", ".join(name[:60] for name in names[:2])
    return first if len(names) < 3 else f"{first} and others, {len(names)} tensors in all,"
