"""The command line, through `main`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quantine
from quantine import cli
from quantine.cli import build_parser
from tiny_models import logits_of, oracle_weights, with_weights

Tiny = Callable[[str], Path]
VERBS = (
    "quantize",
    "plan",
    "eval",
    "compare",
    "report",
    "generate",
    "serve",
    "inspect",
    "bench",
    "push",
)
QUICK = ["--samples", "2", "--seqlen", "16"]
FAST = [*QUICK, "--group-size", "32"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` sets variables for other libraries; tests leave none behind."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def succeed(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_has_examples_of_real_commands(
    verb: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"] if verb else ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    _, _, examples = shown.partition("examples:\n")
    commands = [line.strip() for line in examples.splitlines() if line.startswith("  quantine ")]
    assert len(commands) >= 2
    import shlex

    for command in commands:
        arguments = build_parser().parse_args(shlex.split(command)[1:])
        assert callable(arguments.run)
        assert verb is None or command.split()[1] == verb


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has another OpenMP there")
@pytest.mark.parametrize("set_to", [None, "active"])
def test_threads_of_openmp_sleep_unless_told_otherwise(set_to: str | None, tmp_path: Path) -> None:
    told = {} if set_to is None else {"OMP_WAIT_POLICY": set_to}
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    ran = subprocess.run(
        [sys.executable, "-m", "quantine", "plan", str(tmp_path / "nothing")],
        env={**kept, **told, "OMP_DISPLAY_ENV": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == cli.EXIT_REFUSED
    assert f"OMP_WAIT_POLICY = '{(set_to or 'passive').upper()}'" in ran.stderr


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"quantine {quantine.__version__}\n"


def test_a_model_goes_through_all_verbs(
    tiny: Tiny, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny("llama_tied"), tmp_path / "out"
    request = ["--method", "gptq", "--bits", 3, "--calibration", text_file, *FAST]

    succeed("plan", model, *request, "--json", tmp_path / "plan.json", "--layers")
    planned = json.loads((tmp_path / "plan.json").read_text())
    shown = capsys.readouterr().out
    assert "model.layers.1.mlp.up_proj" in shown
    assert "gptq 3 bit g32 asym" in shown
    assert not out.exists()

    succeed("quantize", model, out, *request)
    assert "block 2/2" in capsys.readouterr().err
    report = json.loads((out / "quantine_report.json").read_text())
    assert report["plan"] == planned["plan"]
    predicted = planned["predicted"]
    assert predicted["quantized_bytes"] == report["totals"]["quantized_bytes"]
    assert predicted["calibration_tokens"] == report["calibration"]["tokens"] == 32
    made = {layer["name"]: (layer["shape"], layer["bytes"]) for layer in report["layers"]}
    promised = {x["name"]: (x["shape"], x["bytes"]) for x in planned["layers"] if x["scheme"]}
    assert made == promised

    window = ["--text", text_file, "--window", 32, "--limit", 4]
    succeed("eval", out, *window, "--reference", model, "--json", tmp_path / "eval.json")
    scores = json.loads((tmp_path / "eval.json").read_text())["texts"]["text.txt"]
    shown = capsys.readouterr().out
    assert f"{scores['perplexity']:.3f}" in shown
    assert "window 4/4" in shown
    assert scores["kl"] > 0

    succeed("inspect", out, "--json", tmp_path / "inspect.json")
    shown = capsys.readouterr().out
    size = (out / "model.safetensors").stat().st_size
    assert f"{size:,} bytes" in shown
    found = json.loads((tmp_path / "inspect.json").read_text())
    assert found["totals"]["file_bytes"] == size

    succeed("generate", out, "Line 1", "--tokens", 5)
    captured = capsys.readouterr()
    loaded, tokenizer = quantine.load(out)
    ids = tokenizer("Line 1", return_tensors="pt")["input_ids"]
    continued = loaded.generate(
        ids, attention_mask=ids > -1, do_sample=False, max_new_tokens=5, pad_token_id=0
    )
    text = tokenizer.decode(continued[0, ids.shape[1] :], skip_special_tokens=True)
    assert captured.out.rstrip("\n") == text.rstrip("\N{REPLACEMENT CHARACTER}\n")
    assert "tokens/s" in captured.err
    assert "7 prompt tokens" in captured.err


def test_heads_have_bits_of_their_own(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    succeed("plan", tiny("llama"), "--bits", 3, "--head-bits", 8, *FAST, "--json", path)
    layers = json.loads(path.read_text())["layers"]
    by_name = {layer["name"]: layer["scheme"] for layer in layers}
    for name in ("model.embed_tokens", "lm_head"):
        assert (by_name[name]["method"], by_name[name]["bits"]) == ("rtn", 8)
    assert by_name["model.layers.0.mlp.up_proj"]["bits"] == 3
    capsys.readouterr()
    assert cli.main(["plan", "demo", "--plan", str(path), "--head-bits", "8"]) == 2
    assert "--plan decides everything: leave out --head-bits" in capsys.readouterr().err


def test_targets_are_plans(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    target = ("--target", "llama.cpp:Q5_0")
    succeed("plan", tiny("llama"), *target, *QUICK, "--json", path)
    schemes = [layer["scheme"] for layer in json.loads(path.read_text())["layers"]]
    assert {(one["method"], one["bits"], one["format"]) for one in schemes} >= {
        ("gptq", 5, "ggml"),
        ("rtn", 8, "ggml"),
    }
    succeed("quantize", tiny("llama"), tmp_path / "out", *target, "--method", "rtn", *QUICK)
    succeed("export", tmp_path / "out", tmp_path / "gguf", "--to", "gguf")
    capsys.readouterr()
    assert cli.main(["plan", str(tiny("llama")), *target, "--bits", "3"]) == 2
    assert "--target llama.cpp:Q5_0 decides everything: leave out --bits" in capsys.readouterr().err
    assert cli.main(["plan", str(tiny("llama")), "--target", "llama.cpp:Q9", "--bits", "3"]) == 2
    assert "there is no target llama.cpp:Q9" in capsys.readouterr().err
    asked = [
        "quantize",
        str(tiny("llama")),
        str(tmp_path / "no"),
        "--target",
        "gguf",
        "--bits",
        "4",
    ]
    assert cli.main([*asked, *map(str, FAST)]) == 2
    assert "may have outliers" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_quiet_prints_nothing(
    tiny: Tiny, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    succeed(
        "quantize", tiny("llama"), tmp_path / "out", "--calibration", text_file, *FAST, "--quiet"
    )
    succeed("eval", tmp_path / "out", "--text", text_file, "--window", 16, "--limit", 2, "--quiet")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_resume_through_the_command_line(
    tiny: Tiny, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", tiny("llama"), tmp_path / "out", "--calibration", text_file, *FAST]
    succeed(*command)
    assert cli.main([str(part) for part in command]) == 2
    assert "not empty" in capsys.readouterr().err
    succeed(*command, "--resume")
    assert "finished already" in capsys.readouterr().err
    assert cli.main([*(str(part) for part in command), "--resume", "--seed", "1"]) == 2
    assert "another calibration tokens" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto would choose the GPU")
def test_memory_of_a_gpu_is_planned_without_one(
    tiny: Tiny, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = [tiny("llama"), "--method", "rtn", "--bits", "4", "--group-size", "32"]
    request += ["--calibration", text_file, "--samples", "2", "--seqlen", "16"]
    gpu = [*request, "--device", "cuda", "--max-vram"]
    path = tmp_path / "plan.json"
    succeed("plan", *gpu, "24G", "--json", path)
    shown = " ".join(capsys.readouterr().out.split())
    assert "of at most 24.00 GB" in shown
    assert "no such device is here, so this is arithmetic alone" in shown
    predicted = json.loads(path.read_text())["predicted"]
    assert 0 < predicted["device_memory_bytes"] < predicted["device_limit_bytes"] == 24 * 10**9
    assert cli.main([str(part) for part in ("plan", *gpu, "0.01")]) == 2
    assert "takes at least 0.07 GB on cuda" in capsys.readouterr().err
    assert (
        cli.main([str(part) for part in ("quantize", *gpu[:1], tmp_path / "out", *gpu[1:], "8")])
        == 2
    )
    assert "there is no device 'cuda' here" in capsys.readouterr().err
    succeed("quantize", request[0], tmp_path / "out", *request[1:])
    assert "computing on cpu" in capsys.readouterr().err


def test_how_windows_and_segments_begin_is_said_everywhere(
    tiny: Tiny, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, clauses = {}, {"each": "every window begins", "first": "only the first window of a text"}
    segments = {"each": "in segments, each begun with BOS", "first": "not begun with BOS"}
    request = ["--calibration", text_file, *FAST]
    window = ["--text", text_file, "--window", 32, "--limit", 4]
    for bos, clause in clauses.items():
        out = tmp_path / bos
        succeed("quantize", tiny("llama"), out, *request, "--bos", bos, "--quiet")
        succeed("eval", out, *window, "--bos", bos, "--record", "--json", tmp_path / "eval.json")
        assert clause in capsys.readouterr().out
        kept[bos] = json.loads((tmp_path / "eval.json").read_text())
        assert kept[bos]["bos"] == bos
        report = json.loads((out / "quantine_report.json").read_text())
        assert report["calibration"]["bos"] == report["identity"]["calibration bos"] == bos
        card = (out / "README.md").read_text()
        assert clause in card
        assert segments[bos] in card
        succeed("report", out)
        page = (out / "quantine_report.html").read_text()
        assert clause in page
        assert segments[bos].removeprefix("in segments") in page
        succeed("plan", tiny("llama"), *request, "--bos", bos)
        assert segments[bos] in capsys.readouterr().out
    digests = {found["texts"]["text.txt"]["digest"] for found in kept.values()}
    assert len(digests) == 2
    again = ["quantize", tiny("llama"), tmp_path / "each", *request, "--bos", "first", "--resume"]
    assert cli.main([str(part) for part in again]) == 2
    assert "another calibration bos, calibration tokens" in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(
    tiny: Tiny,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from quantine.run.store import RunStore

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    command = ["quantize", str(tiny("llama")), str(tmp_path / "out"), *FAST, "--quiet"]
    command += ["--calibration", str(text_file)]
    with monkeypatch.context() as patched:
        patched.setattr(RunStore, "finish", interrupted)
        assert cli.main(command) == 130
    assert "--resume" in capsys.readouterr().err
    succeed(*command, "--resume")
    assert quantine.load(tmp_path / "out")


def test_a_plan_file_decides_everything(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"rules": [{"match": "*.1.*", "method": "rtn", "bits": 5}]}))
    for flag in (["--bits", "3"], ["--method", "rtn"], ["--group-size", "32"]):
        arguments = [str(tiny("llama")), "--plan", str(plan), *flag]
        assert cli.main(["quantize", *arguments[:1], str(tmp_path / "out"), *arguments[1:]]) == 2
        assert cli.main(["plan", *arguments]) == 2
        assert capsys.readouterr().err.count(f"leave out {flag[0]}") == 2
    assert not (tmp_path / "out").exists()


def test_json_that_cannot_be_written_is_one_message(
    packed: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "missing" / "out.json"
    assert cli.main(["inspect", str(packed("llama", "rtn")), "--json", str(path)]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["float", "nothing"])
def test_inspect_refuses_what_is_not_ours(
    kind: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny("llama") if kind == "float" else tmp_path / "none"
    assert cli.main(["inspect", str(directory)]) == 2
    assert str(directory) in capsys.readouterr().err


GENERATE_REFUSALS = {
    "tokens": (["x", "--tokens", "0"], "must be positive"),
    "temperature": (["x", "--temperature", "-1"], "temperature must be 0 or at least"),
    "chat": (["x", "--chat"], "no chat template"),
}


@pytest.mark.parametrize(
    ("arguments", "message"), GENERATE_REFUSALS.values(), ids=GENERATE_REFUSALS
)
def test_generate_refuses(
    arguments: list[str], message: str, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", str(tiny("llama")), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_sampling_depends_on_the_seed_alone(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2):
        options = ["--tokens", 24, "--temperature", 1.5, "--seed", seed]
        succeed("generate", tiny("llama"), "Line 1", *options)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


GRID = {"group_size": st.sampled_from([-1, 8, 16, 32]), "sym": st.booleans()}
ROUNDED = {"method": st.just("rtn"), "clip": st.sampled_from(["minmax", "mse"])}
SOLVED = {
    "method": st.just("gptq"),
    "act_order": st.booleans(),
    "groups": st.sampled_from(["static", "refit"]),
}
INSIDE = {"match": st.sampled_from(["@blocks", "*.mlp.*", "*.0.*", "*_proj"])}
OUTSIDE = {"match": st.sampled_from(["@head", "@embedding"])}
BITS = {"bits": st.integers(2, 8)}
GOOD = st.one_of(
    st.fixed_dictionaries({**INSIDE, **ROUNDED, **GRID}, optional=BITS),
    st.fixed_dictionaries({**INSIDE, **SOLVED, **GRID}, optional=BITS),
    st.fixed_dictionaries({**OUTSIDE, **ROUNDED, **GRID}, optional=BITS),
    st.fixed_dictionaries({**INSIDE, "method": st.just("keep")}),
)
BAD = st.one_of(
    st.fixed_dictionaries({**INSIDE, **ROUNDED, "bits": st.sampled_from([0, 1, 9, 4.0])}),
    st.fixed_dictionaries({**INSIDE, **SOLVED, "group_size": st.sampled_from([48, 7, 0])}),
    st.fixed_dictionaries({**OUTSIDE, **SOLVED, **GRID}),
    st.fixed_dictionaries({"match": st.just("*.no.such.layer"), **ROUNDED}),
)
PLANS = st.tuples(
    st.lists(GOOD, min_size=1, max_size=3), st.one_of(*[st.just([])] * 4, BAD.map(lambda x: [x]))
).map(lambda parts: parts[0] + parts[1])


@settings(
    max_examples=24,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(rules=PLANS, samples=st.sampled_from([2, 2, 2, 0]))
def test_what_plan_accepts_quantize_completes_and_what_it_refuses_quantize_refuses(
    rules: list[dict[str, Any]],
    samples: int,
    tiny: Tiny,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path_factory.mktemp("property")
    (root / "plan.json").write_text(json.dumps({"rules": rules}))
    model = str(tiny("llama_tied"))
    request = ["--plan", str(root / "plan.json"), "--calibration", str(text_file)]
    request += ["--samples", str(samples), "--seqlen", "16"]
    accepted = cli.main(["plan", model, *request, "--json", str(root / "out.json")]) == 0
    refusal = capsys.readouterr().err
    status = cli.main(["quantize", model, str(root / "out"), *request, "--quiet"])
    assert status == (0 if accepted else 2)
    if not accepted:
        assert capsys.readouterr().err == refusal
        assert not (root / "out").exists()
        return
    planned = json.loads((root / "out.json").read_text())
    weights = oracle_weights(root / "out")
    assert {x["name"] for x in planned["layers"] if x["scheme"]} == set(weights)
    loaded, _ = quantine.load(root / "out", arithmetic="exact")
    if "model.embed_tokens" in weights and "lm_head" not in weights:
        weights["lm_head"] = weights["model.embed_tokens"]
    expected = logits_of(with_weights(tiny("llama_tied"), weights))
    assert (logits_of(loaded) - expected).abs().max() < 2e-5


def test_the_float_model_can_be_evaluated_too(tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    options = ["--text", text_file, "--window", 32, "--limit", 2, "--quiet"]
    succeed("eval", tiny("llama"), *options, "--json", tmp_path / "a.json")
    succeed("eval", tiny("llama"), *options, "--dtype", "bfloat16", "--json", tmp_path / "b.json")
    a, b = (
        json.loads((tmp_path / name).read_text())["texts"]["text.txt"]
        for name in ("a.json", "b.json")
    )
    assert a["perplexity"] != b["perplexity"]
    assert a["perplexity"] == pytest.approx(b["perplexity"], rel=0.05)


def test_what_others_packed_runs_as_floats(
    packed: Callable[[str, str], Path], text_file: Path, tmp_path: Path
) -> None:
    out, source = packed("llama", "rtn"), tmp_path / "gptq"
    succeed("export", out, source, "--to", "gptq")
    scored = ["--text", text_file, "--window", 32, "--limit", 2, "--quiet"]
    succeed("eval", out, "--reference", source, *scored, "--json", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["texts"]["text.txt"]["kl"] < 1e-6
    succeed("generate", source, "Line 1", "--tokens", 5)
    plans = ["--plans", "preset:rtn:bits=8:group_size=32", "--samples", 0]
    succeed("compare", source, *plans, *scored, "--out", tmp_path / "compared")
    assert (tmp_path / "compared" / "comparison.json").is_file()


def test_plan_lists_every_matrix_that_stays_in_16_bit(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The projections and positions of opt-350m belong to no block, embedding or head."""
    request = [tiny("opt_projected"), "--method", "rtn", "--samples", "0", "--group-size", "16"]
    succeed("plan", *request, "--json", tmp_path / "plan.json")
    shown = capsys.readouterr().out
    others = json.loads((tmp_path / "plan.json").read_text())["other_matrices"]
    names = {f"model.decoder.{n}.weight" for n in ("project_in", "project_out", "embed_positions")}
    assert {other["name"] for other in others} == names
    assert all(name in shown for name in names)

    succeed("quantize", request[0], tmp_path / "out", *request[1:], "--quiet")
    report = json.loads((tmp_path / "out" / "quantine_report.json").read_text())
    assert names <= {kept["name"] for kept in report["kept"]}


def test_a_budget_takes_both_axes_on_request(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for flags in ((), ("--both-axes",)):
        path = tmp_path / "plan.json"
        succeed("plan", tiny("llama"), "--bits-per-weight", "5", *flags, "--json", path)
        choices = json.loads(path.read_text())["plan"]["choices"]
        found[flags] = {choice["group_axis"] for choice in choices}
    assert found == {(): {"in"}, ("--both-axes",): {"in", "out"}}
    capsys.readouterr()
    assert cli.main(["plan", str(tiny("llama")), "--both-axes"]) == 2
    assert "--bits-per-weight" in capsys.readouterr().err
