"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from extension import native


@pytest.fixture(scope="module", params=["avx512", "avx2", "i8mm", "dotprod", "neon", "scalar"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor has, for products and attention."""
    if request.param not in native().levels():
        pytest.skip(f"this processor has no {request.param}")
    before = native().level()
    native().use_level(request.param)
    yield request.param
    native().use_level(before)
