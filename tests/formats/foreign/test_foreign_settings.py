"""What ``quantization_config`` of other engines says of each layer, and what of it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from quantine import FormatError
from quantine.formats.foreign.awq.read import LAYOUT as AWQ
from quantine.formats.foreign.compressed_tensors.read import LAYOUT as COMPRESSED_TENSORS

LAYER = "model.layers.1.self_attn.k_proj"


def test_groups_of_compressed_tensors_are_ranked_as_by_the_library() -> None:
    def spec(*groups: tuple[int, list[str]], ignore: Sequence[str] = ()) -> int | None:
        said = [
            {
                "targets": targets,
                "format": "pack-quantized",
                "weights": {
                    "num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"
                },
            }
            for bits, targets in groups
        ]  # fmt: skip
        named = {f"group_{number}": group for number, group in enumerate(said)}
        found = COMPRESSED_TENSORS.read_settings({"config_groups": named, "ignore": [*ignore]})
        grid = found(LAYER)
        return None if grid is None else grid.bits

    assert spec((8, ["re:.*k_proj"]), (4, [LAYER])) == 4
    assert spec((3, ["Linear"]), (8, ["re:.*k_proj"])) == 8
    assert spec((8, ["re:model.*"]), (4, ["re:.*k_proj"])) == 4  # of patterns, by the alphabet
    assert spec((8, ["Linear"]), (4, ["Linear"])) == 4  # the last word on one target
    assert spec((4, ["Linear"]), (8, ["re:.*q_proj"])) == 4
    assert spec((4, ["re:.*q_proj"])) is None
    assert spec((4, [LAYER]), ignore=["re:.*k_proj"]) is None
    assert spec((4, [LAYER]), ignore=["Linear"]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules_to_not_convert": 5}, "modules_to_not_convert in quantization_config is no list"),
        ({"group_size": 0}, "group_size must be positive"),
        ({"zero_point": "false"}, "zero_point in quantization_config is 'false'"),
    ],
)
def test_damaged_settings_of_awq(changes: dict[str, Any], message: str) -> None:
    settings = {"version": "gemm", "bits": 4, "group_size": 128, **changes}
    with pytest.raises(FormatError, match=message):
        AWQ.read_settings(settings)


@pytest.mark.parametrize("version", [None, "GEMM", "gemv"])
def test_versions_of_awq(version: str | None) -> None:
    settings = {"version": version, "bits": 4, "group_size": 128}
    if version == "gemv":
        with pytest.raises(FormatError, match="AWQ of version 'gemv'"):
            AWQ.read_settings(settings)
    else:
        assert AWQ.read_settings(settings)(LAYER) is not None


def test_zero_points_of_awq_are_there_unless_its_settings_say_otherwise() -> None:
    """Those that are stored all the same must then be the middle code, as for any engine."""
    settings = {"version": "gemm", "bits": 4, "group_size": 128}
    for said, sym in (({}, False), ({"zero_point": True}, False), ({"zero_point": False}, True)):
        spec = AWQ.read_settings({**settings, **said})(LAYER)
        assert spec is not None
        assert spec.sym is sym
