"""Buffers that no file holds are computed as transformers computes them when it loads a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantine.calibrate.skeleton import make_buffers, skeleton
from quantine.families.derivation.derive import derive
from quantine.families.derivation.small import small_model
from quantine.survey.specimen import specimen_config


@pytest.mark.parametrize("kind", ["llama", "falcon_h1"])
def test_by_a_module_itself_or_by_one_around_it(kind: str) -> None:
    config = specimen_config(kind)
    model: Any = skeleton(config)
    make_buffers(model, model, torch.device("cpu"))
    expected = dict(small_model(config).named_buffers())
    found = dict(model.named_buffers())
    assert found
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_an_architecture_whose_model_computes_its_blocks_buffers_is_understood() -> None:
    assert derive(specimen_config("falcon_h1")).blocks == "model.layers"
