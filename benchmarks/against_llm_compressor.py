"""GPTQ of llm-compressor against quantine's, in the same grids and at the same bytes.

    QUANTINE_LLM_COMPRESSOR_PYTHON=... python benchmarks/against_llm_compressor.py demo OUT.json \\
        --work DIR

The variable names a Python with llm-compressor 0.14. Both start from the same float weights and the
same calibration text, both write `compressed-tensors` files with scales in float16, as vLLM serves
them, and both are imported, which keeps their numbers, and scored by one evaluation. Each row is
written when it is there; rows that are in OUT.json and directories that are in DIR are not made
again. benchmarks/results.py makes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import torch

from llama_cpp_files import nbytes, own_scores
from llama_cpp_inputs import TEXT, Inputs
from quantine import Calibration, Plan, quantize
from quantine.formats.export import export
from quantine.formats.imported import import_model
from quantine.runtime.load import load_model
from quantine.source.locate import locate

GRIDS: Final = (
    {"bits": 4, "group_size": 64, "sym": True},
    {"bits": 4, "group_size": 64, "sym": False},
    {"bits": 3, "group_size": 64, "sym": True},
    {"bits": 3, "group_size": 64, "sym": False},
)
PROGRAM: Final = str(Path(__file__).with_name("llm_compressor_quantizer.py"))


def main() -> None:
    """Make all directories, score them, print and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("json", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(exist_ok=True)
    base = float_directory(arguments.model, work / "float")
    said = {key: vars(arguments)[key] for key in ("samples", "windows", "window")}
    rows = rows_of(arguments.json, said)
    there = {(row["grid"], row["by"]) for row in rows}
    for grid in GRIDS:
        name = f"{grid['bits']} bits in {grid['group_size']}" + ", symmetric" * grid["sym"]
        for by, make in {"llm-compressor": theirs, "quantine": ours}.items():
            if (name, by) in there:
                continue
            made = make(base, grid, arguments.samples, work)
            packed = imported(made, work / f"{made.name}-imported")
            asked = (packed, base, arguments.window, arguments.windows, work / "predictions")
            rows.append({"grid": name, "by": by, "bytes": nbytes(made), "here": own_scores(*asked)})
            print(json.dumps(rows[-1]), flush=True)
            arguments.json.write_text(json.dumps({**said, "rows": rows}, indent=1) + "\n")


def rows_of(path: Path, said: dict[str, int]) -> list[dict[str, Any]]:
    """The rows that an earlier run left.

    Raises:
        SystemExit: it scored other windows or used another calibration.
    """
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = found.pop("rows")
    if found != said:
        raise SystemExit(f"{path} was made with {found}, not {said}: name another file")
    return rows


def float_directory(model: str, out: Path) -> Path:
    """The model in float32, as a Hugging Face directory with its tokenizer."""
    if not (out / "config.json").exists():
        source = locate(model)
        load_model(source, torch.float32).save_pretrained(out)
        source.tokenizer().save_pretrained(out)
    return out


def theirs(base: Path, grid: dict[str, Any], samples: int, work: Path) -> Path:
    """What llm-compressor makes."""
    out = work / f"theirs-{grid['bits']}-{grid['sym']}"
    if not (out / "config.json").exists():
        segments = work / "segments.json"
        tokens = Inputs.of(str(base), torch.float32).calibration(samples)
        segments.write_text(json.dumps(tokens.tolist()), encoding="utf-8")
        python = os.environ["QUANTINE_LLM_COMPRESSOR_PYTHON"]
        command = [python, PROGRAM, str(base), str(segments), str(out), *map(str, grid.values())]
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run(command, check=True, env=clean)
        for file in base.glob("*token*"):
            shutil.copy(file, out)
    return out


def ours(base: Path, grid: dict[str, Any], samples: int, work: Path) -> Path:
    """What quantine's GPTQ makes."""
    solved, out = (work / f"{kind}-{grid['bits']}-{grid['sym']}" for kind in ("solved", "ours"))
    if not solved.exists():
        quantize(base, solved, Plan.preset("gptq", **grid), Calibration(TEXT, samples))
    if not out.exists():
        export(solved, out, "compressed-tensors")
    return out


def imported(directory: Path, out: Path) -> Path:
    """The same weights as a directory of quantine's."""
    if not out.exists():
        import_model(directory, out)
    return out


if __name__ == "__main__":
    main()
