"""The page about a quantized directory: what it says, its verdict, and how it looks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import browser, shown

from quantine import Calibration, FormatError, Plan, PlanError, cli, quantize
from quantine.core.activation_spec import ActivationSpec
from quantine.report.facts import gather
from quantine.report.page import page
from quantine.report.record import quality_section
from quantine.report.sections import SECTIONS
from quantine.report.verdict import Check, checks_of, floors_of
from quantine.run.card import model_card

Tiny = Callable[[str], Path]
Packed = Callable[[str, str], Path]


TITLES = [title for title, _ in SECTIONS if title not in {"Axes of groups", "Clusters of channels"}]
"""Of a page about weights alone, whose groups all run along inputs."""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` sets variables for other libraries; tests leave none behind."""
    import os

    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.fixture(scope="module")
def out(tiny: Tiny, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with outliers, measured and recorded."""
    directory = tmp_path_factory.mktemp("report") / "out"
    request = ["--preset", "spqr-3bit", "--calibration", str(text_file), "--samples", "4"]
    quantize = ["quantize", str(tiny("llama")), str(directory), *request, "--seqlen", "32"]
    assert cli.main([*quantize, "--quiet"]) == 0
    measure = ["eval", str(directory), "--text", str(text_file), "--window", "32", "--limit", "6"]
    assert cli.main([*measure, "--reference", str(tiny("llama")), "--record", "--quiet"]) == 0
    return directory


@pytest.fixture(scope="module")
def comparison(
    out: Path, tiny: Tiny, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("compared") / "all"
    plans = "preset:spqr-3bit,preset:rtn:bits=3:group_size=32,preset:rtn:bits=6:group_size=32"
    arguments = ["compare", str(tiny("llama")), "--plans", plans, "--out", str(directory)]
    arguments += ["--calibration", str(text_file), "--samples", "4", "--seqlen", "32", "--quiet"]
    arguments += ["--text", str(text_file), "--window", "32", "--limit", "6"]
    assert cli.main(arguments) == 0
    return directory


@pytest.fixture(scope="module")
def html(out: Path, comparison: Path) -> Path:
    path = out / "quantine_report.html"
    options = ["--comparison", str(comparison), "--floor", "recovery=0.01"]
    assert cli.main(["report", str(out), *options]) == 0
    return path


class Checked(HTMLParser):
    """Counts what is wrong with a page: tags that do not close, names used twice, links outside."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.outside: list[str] = []
        self.wrong: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in {"src", "href", "xlink:href", "action", "data"} and not str(
                value
            ).startswith(("#", "data:")):
                self.outside.append(str(value))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_sound_and_needs_nothing_else(html: Path) -> None:
    checked = Checked()
    checked.feed(html.read_text())
    assert checked.open == checked.wrong == []
    assert checked.outside == []
    assert len(checked.ids) == len(set(checked.ids))
    source = html.read_text()
    assert "<script" not in source
    assert not re.search(r"url\((?!#|data:)", source)
    assert "@import" not in source


def test_it_says_what_was_measured_and_how_to_repeat_it(out: Path, html: Path) -> None:
    checked = Checked()
    checked.feed(html.read_text())
    text = " ".join(checked.text)
    scores = json.loads((out / "quantine_scores.json").read_text())
    report = json.loads((out / "quantine_report.json").read_text())
    (measured,) = scores["texts"].values()
    for value in (
        f"{report['totals']['bits_per_weight']:.2f}",
        f"{measured['perplexity']:.3f} ± {measured['stderr']:.3f}",
        f"{measured['reference_perplexity']:.3f}",
        f"{measured['recovery']:.1%}",
        f"{measured['kl']:.4f}",
        measured["digest"],
        report["identity"]["weights"],
        scores["files"]["model.safetensors"],
        *scores["versions"].values(),
        "seed 0",
        "key-value cache",
    ):
        assert value in text
    for sample in scores["samples"]:
        assert f"after {sample['prompt_tokens']} tokens" in text
    assert [s["prompt_tokens"] for s in scores["samples"]] == [16]  # others exceed the context
    titles = re.findall(r"<h2>(.*?)</h2>", html.read_text())
    assert titles == TITLES


def test_the_same_directory_gives_the_same_page(out: Path, comparison: Path, html: Path) -> None:
    assert page(gather(out, {"recovery": 0.01}, comparison)) == html.read_bytes().decode()


def test_what_is_not_there_is_left_out(packed: Packed) -> None:
    bare = page(gather(packed("llama", "rtn"), {}, None))
    titles = re.findall(r"<h2>(.*?)</h2>", bare)
    assert titles == ["In short", "Matrices", "Memory", "What quantizing took", "Reproduce"]
    assert "Quality was not measured" in bare


def test_clusters_and_the_small_cache_are_shown(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    plan = Plan.scheme("W4A4KV", method="rtn")
    out = quantize(tiny("llama"), tmp_path / "out", plan, short).path
    whole = page(gather(out, {}, None))
    assert "<h2>Clusters of channels</h2>" in whole
    assert 'aria-label="Channels in clusters"' in whole
    assert "the same in 4 bit, as generating keeps it" in whole
    if browser() is not None:
        (tmp_path / "page.html").write_text(whole)
        found = shown(tmp_path / "page.html", 390, tmp_path / "shown")
        assert found["overflow"] <= 0
        assert found["problems"] == found["console"] == []


def test_axes_are_shown_where_matrices_chose_them(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    plan = Plan.preset("rtn-ada-3bit", group_size=32)
    out = quantize(tiny("llama"), tmp_path / "out", plan, short).path
    facts = gather(out, {}, None)
    whole = page(facts)
    assert "<h2>Axes of groups</h2>" in whole
    assert 'aria-label="Axes of groups"' in whole
    along = sum(layer.group_axis == "out" for layer in facts.layers)
    assert f"outputs in {along} of {len(facts.layers)} matrices" in whole
    if browser() is not None:
        (tmp_path / "page.html").write_text(whole)
        found = shown(tmp_path / "page.html", 390, tmp_path / "shown")
        assert found["overflow"] <= 0
        assert found["problems"] == found["console"] == []


def test_a_cache_that_stays_float_has_no_smaller_size(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    plan = replace(Plan.preset("rtn", group_size=32), activations=ActivationSpec(key=4))
    out = quantize(tiny("llama"), tmp_path / "out", plan, short).path
    assert "as generating keeps it" not in page(gather(out, {}, None))


def test_names_from_files_are_only_text(out: Path) -> None:
    facts = gather(out, {}, None)
    facts.report["model"] = "<script>alert(1)</script>"
    assert "<script" not in page(facts)


def test_the_status_is_the_verdict(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = json.loads((out / "quantine_scores.json").read_text())
    (measured,) = scores["texts"].values()
    target = ["--html", str(tmp_path / "page.html")]
    for distance, status in ((-0.01, 0), (0.01, 1)):
        floor = f"recovery={measured['recovery'] + distance}"
        assert cli.main(["report", str(out), "--floor", floor, *target]) == status
        said = capsys.readouterr().out
        assert ("below the floor" in said) == bool(status)
        word = "Below the floor" if status else "Good enough"
        assert word in (tmp_path / "page.html").read_text()
    assert cli.main(["report", str(out), "--floor", "recovery=0.01,top1=0.999", *target]) == 1


def test_floors_that_mean_nothing_are_refused(
    out: Path, packed: Packed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for floor in ("recovery", "recovery=x", "beauty=0.5", "recovery=98"):
        with pytest.raises(PlanError, match=r"floor"):
            floors_of([floor])
    assert cli.main(["report", str(packed("llama", "rtn")), "--floor", "recovery=0.9"]) == 2
    assert "--record" in capsys.readouterr().err
    assert cli.main(["report", str(out), "--comparison", str(out)]) == 2
    assert "quantine compare" in capsys.readouterr().err
    (tmp_path / "comparison.json").write_text('{"rows": []}')
    assert cli.main(["report", str(out), "--comparison", str(tmp_path)]) == 2
    assert "is no comparison" in capsys.readouterr().err


def test_a_check_is_sure_when_its_whole_interval_is() -> None:
    assert Check("x", 0.99, 0.98, 0.985, 0.995).sure
    assert not Check("x", 0.99, 0.98, 0.975, 1.005).sure
    assert Check("x", 0.9, 0.98, 0.88, 0.92).sure
    assert not Check("x", 0.99, 0.98).sure
    scores: dict[str, Any] = {"texts": {}, "tasks": {"t": {"recovery": None}}}
    with pytest.raises(PlanError, match="no recovery"):
        checks_of(scores, {"recovery": 0.9})


def test_agreement_has_an_interval_where_there_are_enough_windows() -> None:
    text = {"top1": 0.95, "top1_stderr": 0.01, "windows": 24}
    scores: dict[str, Any] = {"texts": {"a": text, "b": {**text, "windows": 2}}, "tasks": {}}
    sure, unsure = checks_of(scores, {"top1": 0.9})
    assert sure.low == pytest.approx(0.95 - 2.0687 * 0.01, abs=1e-4)
    assert sure.high == pytest.approx(0.95 + 2.0687 * 0.01, abs=1e-4)
    assert sure.sure
    assert not unsure.sure


def test_only_directories_of_ours_keep_scores(
    tiny: Tiny, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(tiny("llama")), "--text", str(text_file), "--record", "--quiet"]
    assert cli.main(arguments) == 2
    assert "no finished directory of quantine" in capsys.readouterr().err
    with pytest.raises(FormatError):
        gather(tiny("llama"), {}, None)


def test_the_card_has_the_numbers_and_runs_as_written(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    card = (copy / "README.md").read_text()
    scores = json.loads((copy / "quantine_scores.json").read_text())
    report = json.loads((copy / "quantine_report.json").read_text())
    assert card == model_card(report, quality_section(scores))
    (measured,) = scores["texts"].values()
    assert f"{measured['perplexity']:.3f} ± {measured['stderr']:.3f}" in card
    assert f"{measured['recovery']:.1%}" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(copy)
    exec(compile(code, "card", "exec"), {})
    assert "The capital of France is" in capsys.readouterr().out


@pytest.mark.skipif(browser() is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_shows_it_whole(width: int, html: Path, tmp_path: Path) -> None:
    found = shown(html, width, tmp_path / "shown")
    assert found["width"] == width
    assert found["overflow"] <= 0
    assert found["problems"] == found["console"] == found["resources"] == []
    assert found["headings"] == TITLES
    assert "Good enough" in found["text"]
    assert len(found["pictures"]) == 3
    # On a phone pictures are moved under the finger: their texts would be too small otherwise.
    assert all(500 < picture <= max(width, 600) for picture in found["pictures"])


@pytest.mark.skipif(browser() is None, reason="there is no Chromium")
def test_dark_and_light_differ(html: Path, tmp_path: Path) -> None:
    light = shown(html, 800, tmp_path / "light")
    dark = shown(html, 800, tmp_path / "dark", dark=True)
    assert light["background"] == "rgb(255, 255, 255)"
    assert dark["background"] != light["background"]
    assert dark["ink"] != light["ink"]
    assert "rgb(27, 58, 107)" in light["strokes"]  # the line that joins the best plans
    assert "rgb(27, 58, 107)" not in dark["strokes"]
