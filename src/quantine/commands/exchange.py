"""The verbs `export` and `import`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantine.commands.arguments import DTYPES, TEXT_FILES_HELP, add_verb, comma_list
from quantine.commands.json_output import check_writable, write_json_output

if TYPE_CHECKING:
    from quantine.formats.export import Exported


def add(verbs: Any) -> None:
    """Add the verbs and their options to the subparsers ``verbs``."""
    _add_export(verbs)
    _add_import(verbs)


def _add_import(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "import",
        _import,
        "Turn a checkpoint that another program quantized into a directory of quantine's, with the "
        "same weights.",
        "  quantine import ./Llama-3.2-1B-GPTQ out\n  quantine import model-Q4_0.gguf out",
    )
    parser.add_argument(
        "model",
        metavar="SOURCE",
        help="a .gguf file, or a directory or hub id of GPTQ, AWQ or compressed-tensors",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write, new or empty")


def _import(arguments: argparse.Namespace) -> None:
    from quantine.formats.imported import import_model

    imported = import_model(arguments.model, arguments.out)
    if imported.decoded:
        names = ", ".join(imported.decoded[:2])
        print(f"on no grid of quantine's, so in floats: {len(imported.decoded)} layers ({names})")
    print(f"written: {imported.path}, {imported.layers} layers with the same weights")


def _add_export(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "export",
        _export,
        "Write a quantized directory for another engine, with the same weights.",
        "  quantine export out out-gguf --to gguf\n"
        "  quantine export out out-ct --to compressed-tensors --target vllm\n"
        "  quantine export out out-gguf --to gguf --nearest --text builtin --limit 8\n"
        "  quantine export out out-float --to float --dtype bfloat16",
    )
    parser.add_argument("source", metavar="OUT", type=Path, help="a quantized directory")
    parser.add_argument("out", metavar="DIR", type=Path, help="directory to write, new or empty")
    parser.add_argument(
        "--to",
        required=True,
        metavar="NAME",
        help="float, gguf, gptq, compressed-tensors or spqr",
    )
    parser.add_argument(
        "--target", metavar="ENGINE", help="vllm: refuse also what vLLM does not serve of it"
    )
    parser.add_argument(
        "--nearest",
        action="store_true",
        help="round layers that do not fit to the nearest that does, and say what that costs; "
        "otherwise they are refused",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of floats; default as they are stored, decoded weights in float32",
    )
    parser.add_argument(
        "--text",
        type=comma_list,
        metavar="NAME|FILE,...",
        help=f"with --nearest: perplexity before and after, on builtin or {TEXT_FILES_HELP}",
    )
    parser.add_argument("--window", type=int, metavar="N", help="tokens per window; default 2048")
    parser.add_argument("--limit", type=int, metavar="N", help="windows of each text at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the losses as JSON")


def _export(arguments: argparse.Namespace) -> None:
    check_writable(arguments.json)
    _check_texts(arguments)
    import torch

    from quantine.formats.export import describe_errors, export

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    exported = export(
        arguments.source,
        arguments.out,
        arguments.to,
        nearest=arguments.nearest,
        engine=arguments.target,
        dtype=dtype,
    )
    for line in describe_errors(exported):
        print(line)
    for note in exported.notes:
        print(f"note: {note}", file=sys.stderr)
    losses = _losses(arguments, exported) if exported.converted and arguments.text else {}
    if arguments.text and not losses:
        print("note: nothing was rounded, so no text was scored", file=sys.stderr)
    for name, (before, after) in losses.items():
        print(f"{name}: perplexity {before:.4f} before, {after:.4f} after")
    same = "" if exported.converted else ", with the same weights"
    print(f"written: {exported.path} ({exported.nbytes / 1e6:.1f} MB){same}")
    write_json_output(
        arguments.json,
        {
            "layers": exported.converted,
            "notes": exported.notes,
            "bytes": exported.nbytes,
            "perplexity": {
                name: {"before": before, "after": after} for name, (before, after) in losses.items()
            },
        },
    )


def _check_texts(arguments: argparse.Namespace) -> None:
    """Refuse texts that could not be scored, before anything is written."""
    if not arguments.text:
        return
    from quantine.errors import PlanError

    if not arguments.nearest:
        raise PlanError(
            "--text measures what --nearest rounds: add --nearest, or use `quantine eval`"
        )
    from quantine.eval.evaluate import cut_texts
    from quantine.source.locate import locate

    cut_texts(locate(arguments.source), arguments.text, arguments.window, arguments.limit)


def _losses(arguments: argparse.Namespace, exported: Exported) -> dict[str, tuple[float, float]]:
    """Perplexity before and after the rounding, by text.

    What was written holds the weights that a float directory with the same rounding has.
    """
    from quantine.eval.evaluate import evaluate
    from quantine.formats.export import export

    def scored(model: Path) -> dict[str, float]:
        scores = evaluate(
            str(model), arguments.text, window=arguments.window, limit=arguments.limit
        )
        return {name: found["perplexity"] for name, found in scores["texts"].items()}

    with tempfile.TemporaryDirectory(dir=exported.path.absolute().parent) as scratch:
        decoded = Path(scratch) / "float"
        if arguments.to == "float":
            decoded = exported.path
        else:
            export(
                arguments.source,
                decoded,
                "float",
                nearest=True,
                engine=arguments.target,
                weights_of=arguments.to,
            )
        before, after = scored(arguments.source), scored(decoded)
    return {name: (before[name], after[name]) for name in before}
