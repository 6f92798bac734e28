"""Solvers as they run on GPUs of NVIDIA: wholly by programs, here in Triton's interpreter."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
from gpu_device import DEVICE, moved

from quantine.core.spec import QuantSpec
from quantine.errors import SolverError
from quantine.kernels import backend
from quantine.kernels.gram import add_gram
from quantine.methods.gptq import GPTQ
from quantine.methods.rtn import RTN
from quantine.methods.solver import Solver
from quantine.methods.spqr import SpQR
from quantine.statistics.hessian import Hessian
from samples import FAITHFUL, FAITHFUL_SPEC, correlated_inputs, random_weight

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from quantine.kernels.columns.triton import columns
from quantine.kernels.fit.triton import groups

ROWS, INPUTS = 16, 32

SOLVERS: dict[str, tuple[Solver, QuantSpec]] = {
    "rtn": (RTN("mse"), QuantSpec(4, 16)),
    "gptq": (GPTQ(), QuantSpec(3, 16)),
    "gptq, aligned": (GPTQ(groups="aligned"), QuantSpec(3, 16, sym=True)),
    "spqr": (SpQR(), QuantSpec(3, 16, scale_bits=3)),
    "spqr, out": (SpQR(clip="minmax"), QuantSpec(3, 16, scale_bits=3, group_axis="out")),
    "gptq, swept": (GPTQ(sweeps=2), QuantSpec(3, 16)),
    "spqr, swept": (SpQR(sweeps=2), QuantSpec(3, 16, scale_bits=3)),
    "spqr, as published": (FAITHFUL, FAITHFUL_SPEC),
}


@pytest.fixture(autouse=True)
def _no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let programs run on the CPU, too, and nothing else in their place."""

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("a reference ran in the place of a program")

    monkeypatch.setattr(backend, "of", lambda *_: "triton")
    monkeypatch.setattr(groups, "fit_groups_reference", refuse)
    monkeypatch.setattr(columns, "fit_if_first", refuse)
    monkeypatch.setattr(columns, "round_block_reference", refuse)


def seen(device: str) -> Hessian:
    hessian = Hessian(INPUTS, add_gram, device)
    hessian.update(correlated_inputs(INPUTS, 200).to(device))
    return hessian


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_find_what_references_find(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solver, spec = SOLVERS[name]
    weight = random_weight(ROWS, INPUTS)
    found = moved(solver(moved(weight), seen(DEVICE), spec), "cpu")
    monkeypatch.setattr(backend, "of", lambda *_: "reference")
    expected = solver(weight, seen("cpu"), spec)
    differing = (found.codes != expected.codes).any(0 if spec.group_axis == "out" else 1)
    assert float(differing.float().mean()) <= 0.2
    errors = [
        seen("cpu").error_energy(weight - solved.dequantize()) for solved in (found, expected)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    kept = [
        0 if solved.outliers is None else solved.outliers.entries for solved in (found, expected)
    ]
    assert abs(kept[0] - kept[1]) <= 1


@pytest.mark.parametrize("name", ["gptq", "gptq, aligned", "spqr", "spqr, out"])
def test_what_float16_does_not_hold_is_refused_once_a_matrix(name: str) -> None:
    solver, spec = SOLVERS[name]
    weight = random_weight(ROWS, INPUTS)
    weight[3, 5] = 1e7
    with pytest.raises(SolverError, match=r"float16.*rescale the weights"):
        solver(moved(weight), seen(DEVICE), spec)
