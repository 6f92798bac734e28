"""The short forms of plans in a comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantine import Plan, PlanError
from quantine.comparison.short_forms import name_of, plan_of, plans_of
from quantine.core.tuning_spec import SETTINGS


def test_every_form_means_its_plan(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rules: [{match: '@blocks', method: rtn, bits: 5}]")
    expected = {
        "3.65": Plan.budget(3.65),
        "3.3,both_axes=true,head_bits=8": Plan.budget(3.3, ("in", "out")).with_head(8),
        "3.3,tune=quick": replace(Plan.budget(3.3), tune=SETTINGS["quick"]),
        "rtn,tune=long": replace(Plan.preset("rtn"), tune=SETTINGS["long"]),
        "spqr-3bit": Plan.preset("spqr-3bit"),
        "best-3bit": Plan.preset("best-3bit"),
        "gptq,bits=3,sym=true": Plan.preset("gptq", bits=3, sym=True),
        "spqr,threshold=inf": Plan.preset("spqr", threshold="inf"),
        "W4A4KV-faithful,method=spqr": Plan.scheme("W4A4KV-faithful", method="spqr"),
        "mine": Plan.from_file(path),
    }
    points = [
        "3.65",
        "3.3:both_axes=true:head_bits=8",
        "3.3:tune=quick",
        "preset:rtn:tune=long",
        "preset:spqr-3bit",
        "preset:best-3bit",
        "preset:gptq:bits=3:sym=true",
    ]
    points += ["preset:spqr:threshold=inf", "scheme:W4A4KV-faithful:method=spqr", str(path)]
    assert plans_of(points) == expected


BAD = {
    "word": ("nonsense", "is no plan"),
    "preset": ("preset:nonsense", "preset must be one of"),
    "parameter": ("preset:gptq:bits", "parameters look like"),
    "two values": ("preset:gptq:bits=3=4", "parameters look like"),
    "scheme": ("scheme:W4", "scheme must be like"),
    "unknown parameter": ("preset:gptq:bit=3", "bit"),
    "file": ("missing.yaml", "cannot be read"),
    "budget": ("-1", "above 0"),
    "budget's parameter": ("3.5:bits=3", "takes both_axes=true and head_bits=8"),
    "tuning": ("3.5:tune=fast", "tune must be one of quick, long, whole"),
    "budget's value": ("3.5:both_axes=1", "takes both_axes=true and head_bits=8"),
}


@pytest.mark.parametrize(("point", "message"), BAD.values(), ids=BAD)
def test_what_means_nothing_is_refused(point: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(point)


def test_names_are_file_names_and_differ(tmp_path: Path) -> None:
    assert name_of("preset:gptq:bits=3") == "gptq,bits=3"
    assert "/" not in name_of("preset:../../x")
    with pytest.raises(PlanError, match=r"two plans are called '3\.5'"):
        plans_of(["3.5", "3.5"])
    with pytest.raises(PlanError, match="cannot be called 'float'"):
        name_of(str(tmp_path / "float.yaml"))
