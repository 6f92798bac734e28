"""How many attention heads a model has, and how wide they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantine.families.family import Family


@dataclass(frozen=True)
class Heads:
    """Numbers of attention heads of a model.

    Attributes:
        queries: number of heads of queries.
        keys: number of heads of keys and values, which divides ``queries``.
    """

    queries: int
    keys: int

    @classmethod
    def of(cls, config: Any, family: Family) -> Heads:
        """Read them from a model's configuration in transformers.

        Where it does not say how many heads of keys there are, there are as many as of queries. A
        model of which it does not say how many heads it has, or not the same of all blocks, counts
        as having one of all channels.
        """
        config = _of_text(config)
        try:
            queries = int(config.num_attention_heads)
            keys = getattr(config, family.key_heads, None) if family.key_heads else None
            return cls(queries, int(keys or queries))
        except (AttributeError, TypeError, RuntimeError):  # the last where blocks differ
            return cls(1, 1)

    @property
    def copies(self) -> int:
        """Number of heads of queries that share a head of keys and values."""
        return self.queries // self.keys

    @staticmethod
    def width(config: Any) -> int:
        """Number of channels of a head, from a model's configuration in transformers."""
        config = _of_text(config)
        own = getattr(config, "head_dim", None)
        return int(own or config.hidden_size // config.num_attention_heads)


def _of_text(config: Any) -> Any:
    """What a configuration says of its text model, where there are others beside."""
    of_text = getattr(config, "get_text_config", None)
    return config if of_text is None else of_text()
