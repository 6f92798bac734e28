"""Files solved in llama.cpp's own types against those that its quantizer makes, at equal bytes.

    QUANTINE_LLAMA_CPP_PYTHON=... python benchmarks/llama_cpp_types.py demo OUT.json --work DIR

Both start from the same float weights and the same calibration text: of it, llama.cpp's quantizer
gets the mean square of each input (its importance matrix), quantine the same and how inputs move
together. Both files are opened here, as floats, and scored by one evaluation: perplexity on
held-out text, and the mean divergence of predictions from those of the float model. llama.cpp
scores them, too, as it serves them. Files that are already in DIR are not made again.
With ``--loss-weights`` quantine makes another file of each type, in which tokens count by the loss.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from llama_cpp_files import (
    engine,
    float_and_importance,
    own_scores,
    quantized_by_engine,
    sizes,
)
from llama_cpp_inputs import TEXT, arguments_of, held_out
from quantine import Calibration, quantize
from quantine.formats.export import export
from quantine.formats.foreign.gguf.target import FILE
from quantine.run.target_plan import target_plan
from quantine.source.locate import locate


def main() -> None:
    """Make all files, score them, print and write a row for each."""
    parser = arguments_of(__doc__.splitlines()[0], windows=16)
    parser.add_argument("--loss-weights", action="store_true")
    arguments = parser.parse_args()
    work, length, count = arguments.work, arguments.window, arguments.windows
    work.mkdir(exist_ok=True)
    ways = (False, True) if arguments.loss_weights else (False,)
    files = made(arguments.model, arguments.targets, ways, arguments.samples, work)
    served = served_scores([path for _, _, path in files], length, count, work)
    rows = []
    for (target, by, path), there in zip(files, served, strict=True):
        here = own_scores(path, files[0][2], length, count, work / "predictions")
        rows.append({"target": target, "by": by, **sizes(path), "here": here, "there": there})
        print(json.dumps(rows[-1]), flush=True)
    said = {key: vars(arguments)[key] for key in ("samples", "windows", "window")}
    arguments.json.write_text(json.dumps({**said, "rows": rows}, indent=1) + "\n")


def made(
    model: str, targets: Sequence[str], ways: Sequence[bool], samples: int, work: Path
) -> list[tuple[str, str, Path]]:
    """The float file, and of every target llama.cpp's and quantine's: target, by whom, path.

    Quantine makes one for each of ``ways``: whether tokens count by the loss.
    """
    base, importance = float_and_importance(model, samples, work)
    files = [("float", "float", base)]
    for target in targets:
        theirs = quantized_by_engine(base, importance, target, work)
        files.append((target, "llama.cpp", theirs))
        for weighted in ways:
            name = f"{target}.loss" if weighted else target
            exported = work / f"{name}.gguf.d"
            if not exported.exists():
                solve(model, target, weighted, samples, work / f"{name}.quantine", exported)
            by = "quantine, by the loss" if weighted else "quantine"
            files.append((target, by, exported / FILE))
    return files


def served_scores(
    files: Sequence[Path], length: int, count: int, work: Path
) -> list[dict[str, float]]:
    """What llama.cpp finds of each file as it serves it, compared with the first."""
    windows = held_out(locate(files[0]), length, count)
    assert windows.context == 1, "llama.cpp is asked for all tokens but the first"
    asked = work / "windows.json"
    asked.write_text(json.dumps(windows.tokens.tolist()))
    found = json.loads(engine("score", str(asked), *map(str, files)).splitlines()[-1])
    return [{key: one[key] for key in ("perplexity", "divergence")} for one in found]


def solve(model: str, target: str, weighted: bool, samples: int, out: Path, exported: Path) -> None:
    """Quantize for ``target``, tokens ``weighted`` by the loss or not, and export."""
    if not out.exists():
        plan = target_plan(model, f"llama.cpp:{target}")
        plan = dataclasses.replace(plan, loss_weights=weighted)
        quantize(model, out, plan, Calibration(TEXT, samples))
    export(out, exported, "gguf")


if __name__ == "__main__":
    main()
