"""The part of a model that runs its blocks is found, whatever path its class gives."""

from __future__ import annotations

import pytest

from quantine.families import family_of
from quantine.families.base import base_of
from quantine.families.derivation.small import bare_model
from quantine.survey.specimen import specimen_config


@pytest.mark.parametrize(
    ("kind", "expected"), [("llama", "model"), ("gpt2", "transformer"), ("llama4", "model")]
)
def test_the_base_runs_the_blocks_and_has_no_head(kind: str, expected: str) -> None:
    model = bare_model(specimen_config(kind))
    path, base = base_of(model, family_of(model.config))
    assert path == expected
    assert base is model.get_submodule(expected)
    assert model.get_output_embeddings() not in list(base.modules())
