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

        Architectures of one matrix for query, key and value of each head count as having as many
        heads of keys as of queries.
        """
        queries = int(config.num_attention_heads)
        if any(link.rows == "interleaved" for link in family.links):
            return cls(queries, queries)  # one matrix has query, key and value of each head
        return cls(queries, int(getattr(config, "num_key_value_heads", None) or queries))

    @property
    def copies(self) -> int:
        """Number of heads of queries that share a head of keys and values."""
        return self.queries // self.keys

    @staticmethod
    def width(config: Any) -> int:
        """Number of channels of a head, from a model's configuration in transformers."""
        own = getattr(config, "head_dim", None)
        return int(own or config.hidden_size // config.num_attention_heads)
