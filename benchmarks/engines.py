"""Perplexity of exported directories in the real engines, and in quantine, on the same tokens.

    python benchmarks/engines.py demo --json benchmarks/results/engines-demo.json
    python benchmarks/engines.py families --json benchmarks/results/engines-families.json

Environment variables name the engines' Pythons, see docs/engines.md: QUANTINE_VLLM_PYTHON (with
quantine in it), QUANTINE_LLAMA_CPP_PYTHON, QUANTINE_COMPRESSED_TENSORS_PYTHON (with transformers
and without quantine). Rows in the file are not made again. ``families`` are tiny random models of
every family that vLLM serves, by quantine's plug-in and by vLLM's own kernels, which want AVX-512;
of those that GGUF files hold; and of all as compressed-tensors. GPTQ files of families that the
plug-in does not serve are read by quantine itself. benchmarks/results.py makes the table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / part) for part in ("", "engines", "engines/vllm")]

from serving import ENVIRONMENT, GGUF_FAMILIES, own_perplexity, run_engine, windows_of  # noqa: E402

from quantine import Calibration, Plan, quantize  # noqa: E402
from quantine.errors import FormatError  # noqa: E402
from quantine.formats.export import export  # noqa: E402
from quantine.formats.imported import import_model  # noqa: E402
from tiny_models import FAMILIES, build, tiny_config  # noqa: E402

RTN: Final[dict[str, dict[str, Any]]] = {
    "2 bits in 64, symmetric": {"bits": 2, "group_size": 64, "sym": True},
    "3 bits in 32": {"bits": 3, "group_size": 32},
    "4 bits in 64, symmetric": {"bits": 4, "group_size": 64, "sym": True},
    "4 bits in 64": {"bits": 4, "group_size": 64},
    "8 bits in rows, symmetric": {"bits": 8, "group_size": -1, "sym": True},
}
"""Plans by name: rounding to the nearest, for what is compared is engines."""


@dataclass(frozen=True)
class Export:
    """One row.

    Attributes:
        plan: a key of `RTN`.
        to: layout, as in ``quantine export --to``; empty for quantine's own.
        engine: what it is shown as.
        variable: names the engine's Python.
        program: of tests/engines, and its arguments after the directory and the windows.
    """

    plan: str
    to: str
    engine: str
    variable: str
    program: tuple[str, ...]


LLAMA: Final = ("QUANTINE_LLAMA_CPP_PYTHON", ("llama_cpp_program.py",))
DECODED: Final = ("QUANTINE_LLAMA_CPP_PYTHON", ("llama_cpp_program.py", "decoded"))
VLLM: Final = ("QUANTINE_VLLM_PYTHON", ("vllm_program.py", "float16"))
PLUGIN: Final = ("QUANTINE_VLLM_PYTHON", ("vllm_program.py", "float32"))
FLOAT: Final = ("QUANTINE_COMPRESSED_TENSORS_PYTHON", ("transformers_program.py", "float32"))
EXPORTS: Final = (
    Export("4 bits in 64", "", "vLLM, quantine's plug-in", *PLUGIN),
    Export("4 bits in 64", "float", "transformers, without quantine", *FLOAT),
    Export("4 bits in 64, symmetric", "gptq", "vLLM, float16", *VLLM),
    Export("4 bits in 64", "compressed-tensors", "vLLM, float16", *VLLM),
    Export("4 bits in 64", "gguf", "llama.cpp", *LLAMA),
    Export("4 bits in 64", "gguf", "llama.cpp, decoded", *DECODED),
    Export("3 bits in 32", "gguf", "llama.cpp", *LLAMA),
    Export("3 bits in 32", "gguf", "llama.cpp, decoded", *DECODED),
    Export("2 bits in 64, symmetric", "gguf", "llama.cpp, decoded", *DECODED),
    Export("8 bits in rows, symmetric", "gguf", "llama.cpp, decoded", *DECODED),
)


LIBRARY: Final = "transformers with the library"
"""What transformers is shown as where compressed-tensors decodes for it, without quantine."""
NOT_LOADED: Final = dict.fromkeys(
    ("falcon_old", "falcon_new", "falcon_alibi"),
    "transformers does not load it, as it initializes weights of FalconLinear, which are packed",
)
"""Families that it does not load, and why."""
IMPORTED: Final = "none: quantine's own reader"
"""What ``quantine import`` is shown as."""
BFLOAT16: Final = ("gemma2", "gemma3")
"""Families that vLLM does not compute in float16."""
WIDER_HEADS: Final = {"num_attention_heads": 2}
"""What tiny models have for vLLM's attention in 16 bits, which does not know heads 16 wide."""
UNCHANGED: Final[Mapping[str, Mapping[str, int]]] = {name: {} for name in FAMILIES}
"""All families, with no change of their tiny configurations."""
TINY_WINDOWS: Final = (80, 16)
"""Tokens of a window of tiny models, which have few positions, and number of windows."""


class Measured:
    """Makes each directory, and its perplexity in quantine, once.

    Args:
        model: as quantine's commands take it.
        windows: length and number of windows of the held-out text.
        scratch: a directory of its own.
    """

    def __init__(self, model: str, windows: tuple[int, int], scratch: Path) -> None:
        self._model, self._windows, self._scratch = model, windows, scratch
        self._here: dict[Path, float] = {}

    def row(self, row: Export) -> dict[str, Any]:
        """Perplexities of one export, there and here, or why it is refused."""
        out = self._scratch / row.plan.replace(" ", "-").replace(",", "")
        if not out.exists():
            # The plug-in multiplies as the directory says, and its peer here multiplies exactly.
            plan = Plan.preset("rtn", clip="mse", arithmetic="exact", **RTN[row.plan])
            quantize(self._model, out, plan, Calibration(samples=0))
        said = {"plan": row.plan, "to": row.to, "engine": row.engine}
        try:
            served = self._exported(out, row.to)
        except FormatError as error:
            return said | {"refused": str(error)}
        length, count = self._windows
        windows = windows_of(out, length, count)
        asked = self._scratch / "asked.json"
        texts = {"windows": windows, "texts": []} if row.program[0] == LLAMA[1][0] else windows
        asked.write_text(json.dumps(texts), encoding="utf-8")
        if out not in self._here:
            self._here[out] = own_perplexity(out, windows)
        name, *arguments = row.program
        there = run_engine(os.environ[row.variable], name, str(served), str(asked), *arguments)
        return said | {
            "there": there["perplexity"],
            "here": self._here[out],
            "windows": f"{count} of {length}",
        }

    def _exported(self, out: Path, to: str) -> Path:
        if not to:
            return out
        served = out.with_name(f"{out.name}-{to}")
        if not served.exists():
            export(out, served, to)
        return served / "model.gguf" if to == "gguf" else served


def main() -> None:
    """Make the rows that the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="demo, a directory or a GGUF file, or `families`")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=8, help="number of windows")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text()) if asked.json.exists() else []
    made: Iterable[dict[str, Any]]
    known = {(row["plan"], row["to"], row["engine"]) for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        if asked.model == "families":
            kinds = (
                families,
                families_in_llama_cpp,
                families_in_the_library,
                families_by_vllm,
                families_read_again,
            )
            made = chain.from_iterable(kind(Path(scratch)) for kind in kinds)
            made = (row for row in made if (row["plan"], row["to"], row["engine"]) not in known)
        else:
            measured = Measured(asked.model, (asked.window, asked.limit), Path(scratch))
            wanted = (row for row in EXPORTS if (row.plan, row.to, row.engine) not in known)
            made = map(measured.row, wanted)
        for row in made:
            rows.append(row)
            asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            print(row, flush=True)


def families(scratch: Path) -> Iterator[dict[str, Any]]:
    """A row for a tiny random model of each family, by quantine's plug-in for vLLM."""
    from directories import SERVED, Directories

    text = scratch / "text.txt"
    text.write_text("".join(f"Line {n}: {n * n % 97} apples.\n" for n in range(400)))
    directories = Directories(scratch / "models", Calibration(str(text), samples=4, seqlen=32))
    made = {family: directories.quantized(family, "mixed") for family in SERVED}
    length, count = TINY_WINDOWS
    windows = windows_of(next(iter(made.values())), length, count)
    scores = scored_by_vllm(list(made.values()), "float32", windows, scratch)
    for (family, out), there in zip(made.items(), scores, strict=True):
        if isinstance(there, str):
            print(f"{family} is not served: {there}", flush=True)
            continue
        yield {
            "plan": family,
            "to": "",
            "engine": "vLLM, quantine's plug-in",
            "there": there,
            "here": own_perplexity(out, windows),
            "windows": f"{count} of {length}",
        }


def scored_by_vllm(
    directories: Sequence[Path], dtype: str, windows: list[list[int]], scratch: Path
) -> list[float | str]:
    """The perplexity that vLLM finds of each directory, or why it does not serve it."""
    options = {"dtype": dtype}
    jobs = [
        {"directory": str(out), "options": options, "prompts": windows, "scored": True}
        for out in directories
    ]
    request, result = scratch / "request.json", scratch / "result.json"
    request.write_text(json.dumps(jobs))
    program = ROOT / "tests" / "engines" / "vllm" / "serve.py"
    command = [os.environ[PLUGIN[0]], str(program), str(request), str(result)]
    subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT, "PYTHONPATH": ""})
    scores: list[float | str] = []
    for found in json.loads(result.read_text()):
        if "error" in found:
            scores.append(found["error"])
            continue
        logprobs = [value for answer in found["answers"] for value in answer["logprobs"]]
        scores.append(math.exp(-sum(logprobs) / len(logprobs)))
    return scores


def families_in_llama_cpp(scratch: Path) -> Iterator[dict[str, Any]]:
    """A row for a tiny random model of each family that GGUF files hold, by llama.cpp."""
    text, asked = scratch / "text.txt", scratch / "asked.json"
    text.write_text("".join(f"Line {n}: {n * n % 97} apples.\n" for n in range(400)))
    for family, changes in GGUF_FAMILIES.items():
        root = scratch / f"gguf-{family}"
        model = build(tiny_config(family, **changes), root / "model")
        plan = Plan.preset("rtn", bits=4, group_size=32)
        out = quantize(model, root / "out", plan, Calibration(str(text), samples=4, seqlen=32)).path
        file = export(out, root / "gguf", "gguf").path / "model.gguf"
        length, count = TINY_WINDOWS
        windows = windows_of(out, length, count)
        asked.write_text(json.dumps({"windows": windows, "texts": []}), encoding="utf-8")
        name, *arguments = DECODED[1]
        there = run_engine(os.environ[DECODED[0]], name, str(file), str(asked), *arguments)
        yield {
            "plan": family,
            "to": "gguf",
            "engine": "llama.cpp, decoded",
            "there": there["perplexity"],
            "here": own_perplexity(out, windows),
            "windows": f"{count} of {length}",
        }


def families_in_the_library(scratch: Path) -> Iterator[dict[str, Any]]:
    """A row for a tiny random model of every family, by transformers with compressed-tensors."""
    (name, *arguments), asked = FLOAT[1], scratch / "asked.json"
    for said, out, served in _symmetric(scratch, "compressed-tensors", LIBRARY, UNCHANGED):
        family = said["plan"]
        if served is None or family in NOT_LOADED:
            yield {"refused": NOT_LOADED.get(family)} | said
            continue
        windows = windows_of(out, *TINY_WINDOWS)
        asked.write_text(json.dumps(windows), encoding="utf-8")
        there = run_engine(os.environ[FLOAT[0]], name, str(served), str(asked), *arguments)
        yield said | {"there": there["perplexity"], "here": own_perplexity(out, windows)}


def families_by_vllm(scratch: Path) -> Iterator[dict[str, Any]]:
    """Rows for tiny random models, by vLLM's own kernels for either layout."""
    from directories import SERVED

    for to, dtype in product(("gptq", "compressed-tensors"), ("float16", "bfloat16")):
        if dtype == "bfloat16":
            families = dict.fromkeys(BFLOAT16, WIDER_HEADS | {"head_dim": 32})
        else:
            families = dict.fromkeys((f for f in SERVED if f not in BFLOAT16), WIDER_HEADS)
        held = []
        root, engine = scratch / "vllm", f"vLLM, {dtype}"
        for said, out, served in _symmetric(root, to, engine, families):
            if served is None:
                yield said
            else:
                held.append((said, out, served))
        windows = windows_of(held[0][1], *TINY_WINDOWS)
        scores = scored_by_vllm([served for _, _, served in held], dtype, windows, scratch)
        for (said, out, _), there in zip(held, scores, strict=True):
            if isinstance(there, str):
                yield said | {"refused": there}
            else:
                yield said | {"there": there, "here": own_perplexity(out, windows)}


def families_read_again(scratch: Path) -> Iterator[dict[str, Any]]:
    """Rows for GPTQ files of the other families, by quantine itself."""
    from directories import SERVED

    others = {name: changes for name, changes in UNCHANGED.items() if name not in SERVED}
    for said, out, served in _symmetric(scratch, "gptq", IMPORTED, others):
        assert served is not None
        windows, back = windows_of(out, *TINY_WINDOWS), out.with_name("back")
        there = own_perplexity(import_model(served, back).path, windows)
        yield said | {"there": there, "here": own_perplexity(out, windows)}


def _symmetric(
    scratch: Path, to: str, engine: str, families: Mapping[str, Mapping[str, int]]
) -> Iterator[tuple[dict[str, Any], Path, Path | None]]:
    """Of each family: what is said of a row, the directory here, and in layout ``to``.

    The last is ``None`` where it is refused, which is then said, too. ``families`` have changes of
    their tiny configurations.
    """
    length, count = TINY_WINDOWS
    for family, changes in families.items():
        root = scratch / to / family
        said: dict[str, Any] = {"plan": family, "to": to, "engine": engine}
        model = build(tiny_config(family, **changes), root / "model")
        plan = Plan.preset("rtn", bits=4, group_size=32, sym=True)
        out = quantize(model, root / "out", plan, Calibration(samples=0)).path
        try:
            served = export(out, root / to, to).path
        except FormatError as error:
            yield said | {"refused": str(error)}, out, None
            continue
        yield said | {"windows": f"{count} of {length}"}, out, served


if __name__ == "__main__":
    main()
