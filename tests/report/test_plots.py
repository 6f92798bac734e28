"""Pictures of a quantized directory."""

from __future__ import annotations

import json
import math
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import quantine
from quantine import Calibration, Plan, cli
from quantine.formats.directory import MAPS
from quantine.formats.inventory import inventory
from quantine.report.plots.clusters import clusters_figure, read_clusters
from quantine.report.plots.draw import draw
from quantine.report.plots.group_axes import axis_figure
from quantine.report.plots.layer_data import LayerPicture, outlier_counts, read_layers, readable_map
from quantine.report.plots.maps import MapFigure
from quantine.report.plots.trends import TRENDS, curves_of, trend_figure
from tiny_models import matrices_of

Tiny = Callable[[str], Path]
Packed = Callable[[str, str], Path]
LAYER = LayerPicture("model.layers.3.fc1", (256, 512), 3, "fc1", 3.5, 0.01, None, None, None)
SHARE, ERROR, SIZE = TRENDS


@pytest.fixture(scope="session")
def spqr(tiny: Tiny, short: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with outliers in its blocks and an embedding without calibration."""
    rules = [
        {"match": "@embedding", "method": "rtn", "bits": 8, "group_size": -1},
        {"match": "@blocks", "method": "spqr", "bits": 3, "group_size": 16, "threshold": 0.3},
    ]
    out = tmp_path_factory.mktemp("plots") / "out"
    return quantine.quantize(tiny("llama_tied"), out, Plan.from_dict({"rules": rules}), short).path


@pytest.fixture(scope="session")
def single(tiny: Tiny, short: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of which one matrix is quantized, so that drawing is quick."""
    rule = {"match": "*.0.mlp.up_proj", "method": "spqr", "bits": 3, "threshold": 0.3}
    out = tmp_path_factory.mktemp("plots") / "single"
    return quantine.quantize(tiny("llama"), out, Plan.from_dict({"rules": [rule]}), short).path


def pictures_of(directory: Path) -> list[LayerPicture]:
    return list(read_layers(directory, inventory(directory)["layers"]))


def png_size(path: Path) -> tuple[int, int]:
    """Width and height from the header, after checking that it is one."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


class TestRun:
    """What `quantine.quantize` records."""

    def test_a_map_of_every_matrix_with_a_hessian(self, spqr: Path, tiny: Tiny) -> None:
        maps = load_file(spqr / MAPS)
        assert sorted(maps) == sorted(matrices_of(tiny("llama_tied")))
        shapes = {layer["name"]: layer["shape"] for layer in inventory(spqr)["layers"]}
        for name, recorded in maps.items():
            assert recorded.dtype == torch.float16
            assert list(recorded.shape) == [min(128, size) for size in shapes[name]]
            assert bool(torch.isfinite(recorded).any())

    def test_none_without_calibration(self, packed: Packed) -> None:
        assert not (packed("llama", "rtn") / MAPS).exists()

    def test_recording_changes_no_weight(
        self,
        tiny: Tiny,
        short: Calibration,
        packed: Packed,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        plan = Plan.preset("gptq", bits=3, group_size=32)
        with_maps = packed("llama", "gptq")
        monkeypatch.setattr("quantine.run.block.sensitivity", lambda *_: {})
        bare = quantine.quantize(tiny("llama"), tmp_path / "bare", plan, short).path
        assert not (bare / MAPS).exists()
        assert (with_maps / MAPS).exists()
        name = "model.safetensors"
        assert (bare / name).read_bytes() == (with_maps / name).read_bytes()


class TestData:
    def test_outliers_are_those_of_the_file(self, spqr: Path) -> None:
        stored = {
            name.removesuffix(".outlier_value"): tensor.numel()
            for name, tensor in load_file(spqr / "model.safetensors").items()
            if name.endswith(".outlier_value")
        }
        assert sum(stored.values()) > 100
        for layer in pictures_of(spqr):
            if layer.block is None:
                assert layer.outliers is None
                assert layer.outlier_share is None  # a dense layout
                continue
            assert layer.outlier_share == stored[layer.name] / math.prod(layer.shape)
            assert layer.outliers is not None
            assert int(layer.outliers.sum()) == stored[layer.name]

    def test_outliers_stay_in_their_place(self) -> None:
        # Of a matrix of at most 32 by 32, every weight is a cell.
        places = torch.tensor([0, 0, 5]), torch.tensor([2, 3, 7])
        counts = outlier_counts(places, (6, 8))
        assert counts.nonzero().tolist() == [[0, 2], [0, 3], [5, 7]]

    def test_a_stored_order_is_undone(self, tiny: Tiny, short: Calibration, tmp_path: Path) -> None:
        plan = Plan.preset("spqr", bits=3, group_size=16, threshold=0.3, groups="refit")
        out = quantine.quantize(tiny("llama"), tmp_path / "out", plan, short).path
        model, _ = quantine.load(out)
        for layer in pictures_of(out):
            module: Any = model.get_submodule(layer.name)
            exact, outliers = module.dequantize(), layer.outliers
            stored = load_file(out / "model.safetensors")
            values = stored[f"{layer.name}.outlier_value"].float()
            assert f"{layer.name}.in_perm" in stored
            assert outliers is not None
            # Every outlier's value stands in a cell that counts one.
            rows = torch.arange(layer.shape[0]) * outliers.shape[0] // layer.shape[0]
            columns = torch.arange(layer.shape[1]) * outliers.shape[1] // layer.shape[1]
            counted = outliers[rows][:, columns] > 0
            assert set(values.tolist()) <= set(exact[counted].tolist())

    @pytest.mark.parametrize("entries", [0, 100, 100_000])
    def test_every_outlier_is_counted_once(self, entries: int) -> None:
        generator = torch.Generator().manual_seed(entries)
        shape = (300, 700)
        rows = torch.randint(shape[0], (entries,), generator=generator)
        columns = torch.randint(shape[1], (entries,), generator=generator)
        counts = outlier_counts((rows, columns), shape)
        assert int(counts.sum()) == entries
        assert counts.shape == ((128, 128) if entries > 50_000 else (32, 32))

    def test_numbers_are_those_of_the_report(self, spqr: Path) -> None:
        report = json.loads((spqr / "quantine_report.json").read_text())
        said = {layer["name"]: layer for layer in report["layers"]}
        for layer in pictures_of(spqr):
            assert layer.bits_per_weight == said[layer.name]["bits_per_weight"]
            assert layer.output_error == said[layer.name]["output_error"]
        kinds = {(layer.block, layer.kind) for layer in pictures_of(spqr)}
        assert (1, "mlp.down_proj") in kinds
        assert (None, "model.embed_tokens") in kinds

    def test_joined_cells_keep_the_mean(self) -> None:
        linear = torch.rand(128, 128) + 0.1
        layer = replace(LAYER, shape=(256, 256), sensitivity=linear.log10())
        expected = linear.view(32, 4, 32, 4).mean((1, 3))
        torch.testing.assert_close(torch.pow(10.0, readable_map(layer)), expected)

    def test_large_matrices_are_shown_cell_by_cell(self) -> None:
        recorded = torch.rand(128, 128)
        found = readable_map(replace(LAYER, shape=(4096, 4096), sensitivity=recorded))
        torch.testing.assert_close(found, recorded)

    def test_damaged_maps_are_one_message(self, spqr: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(spqr, tmp_path / "copy"))
        (copy / MAPS).write_bytes(b"no maps")
        with pytest.raises(quantine.FormatError, match=f"{MAPS} is damaged"):
            pictures_of(copy)


def shown(figure: Any, panel: int) -> Any:
    """The values in a panel of a map figure."""
    return figure.axes[2 * panel].images[0].get_array()


class TestMaps:
    def test_a_planted_column_and_row_are_the_brightest(self) -> None:
        recorded = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)) * 0.2 - 6
        recorded[:, 40] += 2
        recorded[90] += 2
        figure = MapFigure(replace(LAYER, shape=(2048, 4096), sensitivity=recorded)).figure
        values = shown(figure, 0)
        assert values.mean(0).argmax() == 40
        assert values.mean(1).argmax() == 90
        image = figure.axes[0].images[0]
        colours = image.cmap(image.norm(values))[..., :3].mean(2)  # as in grey
        assert colours.mean(0).argmax() == 40
        assert colours.mean(1).argmax() == 90
        assert image.get_extent() == [0, 4096, 2048, 0]  # the first output on top

    def test_outliers_are_shares_of_cells(self) -> None:
        counts = torch.zeros(32, 32, dtype=torch.int64)
        counts[3, 4] = 2
        layer = replace(LAYER, outliers=counts, outlier_share=2 / (256 * 512))
        values = shown(MapFigure(layer).figure, 0)
        assert values[3, 4] == 100 * 2 / (8 * 16)
        assert values.sum() == values[3, 4]

    def test_one_figure_shows_one_matrix_after_another(self) -> None:
        low = replace(LAYER, sensitivity=torch.full((128, 128), -7.0))
        high = replace(LAYER, name="model.layers.4.fc1", sensitivity=torch.full((128, 128), -3.0))
        picture = MapFigure(low)
        assert MapFigure.kind(low) == MapFigure.kind(high)
        picture.show(high)
        assert "model.layers.4.fc1" in picture.figure.get_suptitle()
        assert shown(picture.figure, 0).max() == pytest.approx(-3.0)
        bottom, top = picture.figure.axes[1].get_ylim()
        assert bottom <= -3.0 <= top

    def test_a_map_of_nothing_is_grey(self) -> None:
        layer = replace(LAYER, sensitivity=torch.full((128, 128), -math.inf))
        values = shown(MapFigure(layer).figure, 0)
        assert np.ma.getmaskarray(values).all()


class TestTrends:
    LAYERS = (
        replace(LAYER, name="a.10.q", block=10, kind="q", outlier_share=0.02),
        replace(LAYER, name="a.2.q", block=2, kind="q", outlier_share=0.01),
        replace(LAYER, name="a.2.o", block=2, kind="o", bits_per_weight=4.25),
        replace(LAYER, name="head", block=None, kind="head", bits_per_weight=8.0),
    )

    def test_curves_go_by_block_number(self) -> None:
        assert curves_of(SHARE, self.LAYERS) == {"q": ([2, 10], [1.0, 2.0])}
        assert curves_of(SIZE, self.LAYERS) == {"q": ([2, 10], [3.5, 3.5]), "o": ([2], [4.25])}

    def test_a_panel_for_each_kind_with_the_others_behind(self) -> None:
        figure = trend_figure(SIZE, self.LAYERS)
        assert figure is not None
        assert [axes.get_title() for axes in figure.axes] == ["q", "o"]
        own = figure.axes[1].lines[-1]
        assert own.get_xdata() == [2]
        assert own.get_ydata() == [4.25]
        assert [len(axes.lines) for axes in figure.axes] == [2, 2]

    def test_layers_outside_of_blocks_are_written_below(self) -> None:
        figure = trend_figure(SIZE, self.LAYERS)
        assert figure is not None
        assert "head: 8" in figure.get_supxlabel()

    def test_nothing_known_no_figure(self) -> None:
        assert trend_figure(SHARE, [LAYER]) is None
        assert trend_figure(ERROR, [replace(LAYER, output_error=None)]) is None

    def test_an_error_of_zero_is_shown(self) -> None:
        figure = trend_figure(ERROR, [replace(LAYER, output_error=0.0)])
        assert figure is not None
        assert figure.axes[0].get_yscale() == "linear"


class TestAxes:
    """The picture of chosen axes."""

    def test_tiles_and_both_losses(self) -> None:
        layers = [
            replace(
                LAYER,
                name=f"model.layers.{block}.{kind}",
                block=block,
                kind=kind,
                group_axis="out" if block == 1 else "in",
                axis_losses={"in": 0.1 + block, "out": 0.5},
            )
            for block in range(3)
            for kind in ("fc1", "fc2")
        ]
        figure = axis_figure([*layers, LAYER])
        assert figure is not None
        tiles, *losses = figure.axes
        assert [label.get_text() for label in tiles.get_yticklabels()] == ["fc1", "fc2"]
        colours = [patch.get_facecolor() for patch in tiles.patches]
        assert len(colours) == 7
        assert colours[0] == colours[2] != colours[1]
        assert len(losses) == 2
        for axes in losses:
            along_inputs, along_outputs = axes.get_lines()
            assert along_inputs.get_ydata() == pytest.approx([0.1, 1.1, 2.1])
            assert along_outputs.get_ydata() == pytest.approx([0.5] * 3)
            assert axes.get_yscale() == "log"

    def test_no_choice_no_picture(self) -> None:
        assert axis_figure([LAYER]) is None

    def test_axes_that_differ_are_shown_though_no_layer_compared_their_losses(self) -> None:
        figure = axis_figure([LAYER, replace(LAYER, block=2, group_axis="out")])
        assert figure is not None
        (tiles,) = figure.axes
        first, second = (patch.get_facecolor() for patch in tiles.patches)
        assert first != second

    def test_what_a_directory_records_is_drawn(
        self, tiny: Tiny, short: Calibration, tmp_path: Path
    ) -> None:
        rule = {"match": "*.0.mlp.up_proj", "method": "adadim", "inner": "rtn", "group_size": 16}
        plan = Plan.from_dict({"rules": [rule]})
        out = quantine.quantize(tiny("llama"), tmp_path / "out", plan, short).path
        (layer,) = pictures_of(out)
        choices = inventory(out)["layers"][0]["choice"]["choices"]
        assert layer.axis_losses == {one["group_axis"]: one["loss"] for one in choices}
        pictures = draw(out, tmp_path / "pictures")
        assert tmp_path / "pictures" / "group_axis.png" in pictures.files
        assert not any("group_axis" in line for line in pictures.left_out)


class TestFiles:
    def test_every_picture_is_there_and_whole(self, spqr: Path, tiny: Tiny, tmp_path: Path) -> None:
        seen: list[Path] = []
        target = tmp_path / "new" / "pictures"
        pictures = draw(spqr, target, seen.append)
        maps = [f"maps/{name}" for name in matrices_of(tiny("llama_tied"))]
        stems = sorted([*maps, "outlier_share", "output_error", "bits_per_weight"])
        assert sorted(p.relative_to(target).as_posix() for p in seen) == stems
        expected = sorted(f"{stem}.{kind}" for stem in stems for kind in ("png", "svg"))
        on_disk = sorted(p for p in target.rglob("*") if p.is_file())
        assert [p.relative_to(target).as_posix() for p in on_disk] == expected
        assert sorted(pictures.files) == on_disk
        for path in on_disk:
            assert path.stat().st_size < 1_000_000
            if path.suffix == ".png":
                assert all(300 < size < 2000 for size in png_size(path))
            else:
                assert ElementTree.parse(path).getroot().tag.endswith("svg")
        # The embedding was rounded without calibration.
        told, axes = pictures.left_out
        assert told.startswith("sensitivity of 1 of 15 matrices: ")
        assert axes == "group_axis: all groups run along the same axis, and no layer chose it"
        tree = ElementTree.parse(target / "maps" / "model.layers.0.mlp.up_proj.svg")
        images = [e for e in tree.iter() if e.tag.endswith("}image")]
        assert len(images) == 4  # two maps and their colour bars
        assert all("pixelated" in e.attrib["style"] for e in images)

    def test_without_calibration_maps_are_left_out(self, packed: Packed, tmp_path: Path) -> None:
        pictures = draw(packed("llama", "rtn"), tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "bits_per_weight.png",
            "bits_per_weight.svg",
        ]
        told = "\n".join(pictures.left_out)
        assert "sensitivity of 14 of 14" in told
        assert "outlier_share: no layout" in told
        assert "output_error: outputs were not measured" in told

    def test_maps_that_were_lost_leave_the_outliers(self, single: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(single, tmp_path / "copy"))
        (copy / MAPS).unlink()
        draw(copy, tmp_path / "p")
        (only,) = (tmp_path / "p" / "maps").glob("*.png")
        assert png_size(only)[0] < 600  # one panel

    def test_no_name_leads_out_of_the_directory(self, single: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(single, tmp_path / "copy"))
        config = json.loads((copy / "config.json").read_text())
        layers = config["quantization_config"]["layers"]
        old, new = "model.layers.0.mlp.up_proj", "../../model.layers.0.mlp.up_proj"
        layers[new] = layers.pop(old)
        (copy / "config.json").write_text(json.dumps(config))
        tensors = load_file(copy / "model.safetensors")
        save_file({k.replace(old, new): v for k, v in tensors.items()}, copy / "model.safetensors")
        target = tmp_path / "a" / "b"
        pictures = draw(copy, target)
        assert all(target in path.resolve().parents for path in pictures.files)

    @pytest.mark.parametrize("below", [False, True])
    def test_a_file_in_the_way(self, below: bool, spqr: Path, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("precious")
        target = file / "pictures" if below else file
        with pytest.raises(quantine.PlanError, match="cannot be written"):
            draw(spqr, target)
        assert file.read_text() == "precious"

    def test_a_picture_that_cannot_be_written(self, packed: Packed, tmp_path: Path) -> None:
        (tmp_path / "bits_per_weight.png").mkdir()
        with pytest.raises(quantine.PlanError, match="cannot be written"):
            draw(packed("llama", "rtn"), tmp_path)

    def test_a_foreign_directory_makes_no_pictures(self, tiny: Tiny, tmp_path: Path) -> None:
        with pytest.raises(quantine.FormatError):
            draw(tiny("llama"), tmp_path / "p")
        assert not (tmp_path / "p").exists()

    def test_without_matplotlib_the_extra_is_named(
        self, spqr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(quantine.QuantineError, match=r"pip install 'quantine\[plot\]'"):
            draw(spqr, tmp_path / "p")
        assert not (tmp_path / "p").exists()

    def test_drawing_leaves_no_global_state(self, single: Path, tmp_path: Path) -> None:
        import matplotlib as mpl
        from matplotlib._pylab_helpers import Gcf

        before = dict(mpl.rcParams)
        draw(single, tmp_path)
        assert dict(mpl.rcParams) == before
        assert Gcf.get_all_fig_managers() == []  # pyplot knows no figure of ours


class TestCommand:
    def test_inspect_draws(
        self, packed: Packed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "p"
        assert cli.main(["inspect", str(packed("llama", "rtn")), "--plot", str(target)]) == 0
        captured = capsys.readouterr()
        assert f"pictures: 2 files (.png and .svg) in {target}" in captured.out
        assert "left out: output_error" in captured.out
        assert f"drawn: {target / 'bits_per_weight'}" in captured.err
        assert (target / "bits_per_weight.svg").is_file()

    def test_inspect_refuses_a_file(
        self, packed: Packed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_text("x")
        arguments = ["inspect", str(packed("llama", "rtn")), "--plot", str(tmp_path / "file")]
        assert cli.main(arguments) == 2
        assert "cannot be written" in capsys.readouterr().err


class TestClusters:
    """The channels that a scheme of activations reordered."""

    def test_what_is_recorded_is_drawn(
        self, tiny: Tiny, short: Calibration, tmp_path: Path
    ) -> None:
        plan = Plan.scheme("W4A8", method="rtn")
        out = quantine.quantize(tiny("llama"), tmp_path / "out", plan, short).path
        blocks = read_clusters(out)
        assert len(blocks) == 2
        for kinds in blocks.values():
            assert set(kinds) == {"R1", "R2", "R3", "R4", "R5"}
            for kind, found in kinds.items():
                assert found.shape[1] == (5 if kind == "R2" else 3)
                labels = found[:, -1].unique()
                assert torch.equal(labels, torch.arange(len(labels)).float())
                # KMeans: a channel's range is nearer to its own cluster's mean than to another's.
                if kind in {"R1", "R4", "R5"}:
                    own = found[:, -1].long()
                    means = torch.stack([found[own == n, :-1].mean(0) for n in range(len(labels))])
                    nearest = torch.cdist(found[:, :-1], means).argmin(1)
                    assert (nearest == own).float().mean() > 0.95
        drawn = draw(out, tmp_path / "pictures").files
        names = [path.name for path in drawn if path.parent.name == "clusters"]
        assert sorted(names) == [
            f"model_layers_{n}.{kind}".replace("_layers_", ".layers.")
            for n in range(2)
            for kind in ("png", "svg")
        ]

    def test_without_reorder_there_is_nothing_to_draw(self, single: Path) -> None:
        assert read_clusters(single) == {}


@pytest.mark.parametrize("loudest", [0.9, 9.0, 60.0, 3e4])
def test_ticks_of_channels_are_short_numbers_whatever_the_ranges(loudest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    high = torch.rand(64, generator=generator) * 0.1 + 0.05
    high[3] = loudest
    points = torch.stack([high, -high, torch.arange(64) // 2], 1)
    figure = clusters_figure("block", {"R1": points, "R5": points})
    figure.draw_without_rendering()  # ticks are found when there is a size
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            texts = [tick.label1.get_text() for tick in axis.get_major_ticks()]
            assert all(len(text) <= 6 for text in texts), texts
