"""What the command line takes: verbs, their options, and the help for them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from quantine import __version__

MODEL_HELP: Final = "a Hugging Face directory, a .gguf file, a hub id, or `demo`"
DTYPES: Final = ("float32", "bfloat16", "float16")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every verb; what it parses has the verb's name as ``verb``."""
    parser = argparse.ArgumentParser(
        prog="quantine",
        description="Make large language models small without making them worse.",
        epilog="examples:\n"
        "  quantine quantize demo out --method gptq --bits 4\n"
        "  quantine eval out --reference demo --window 1024 --limit 8\n"
        '  quantine generate out "The capital of France is"\n\n'
        "`quantine VERB --help` has more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"quantine {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_quantize(verbs)
    _add_plan(verbs)
    _add_eval(verbs)
    _add_generate(verbs)
    _add_inspect(verbs)
    _add_bench(verbs)
    return parser


def _add_verb(verbs: Any, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=name)
    return parser


def _add_quantize(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "quantize",
        "Quantize a model into a directory.",
        "  quantine quantize demo out --method gptq --bits 4 --samples 32\n"
        "  quantine quantize ./Llama-3.2-1B out --bits 3 --calibration my-text.jsonl\n"
        "  quantine quantize ./Llama-3.2-1B out --bits-per-weight 3.5 --head-bits 8\n"
        "  quantine quantize ./Llama-3.2-1B out --plan plan.yaml\n"
        "  quantine quantize ./Llama-3.2-1B out --bits 3 --resume",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="output directory, new or empty")
    _add_request(parser)
    parser.add_argument("--resume", action="store_true", help="continue the unfinished run in OUT")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_plan(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "plan",
        "Show what quantize would do, and what it would take, without loading weights.",
        "  quantine plan demo --method gptq --bits 3\n"
        "  quantine plan ./Llama-3.2-1B --plan plan.yaml --layers\n"
        "  quantine plan ./Llama-3.2-1B --bits 3 --json request.json",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _add_request(parser)
    parser.add_argument("--layers", action="store_true", help="list every layer, not one per kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")


def _add_request(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=("rtn", "gptq", "spqr"), help="default spqr")
    parser.add_argument("--bits", type=int, metavar="B", help="bits per code, 2 to 8; default 4")
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="G",
        help="inputs that share a scale; -1 for the whole row; default 64, for spqr 16",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="spqr-2bit, spqr-3bit, spqr-4bit, spqr-faithful (the published algorithm); "
        "rtn-ada-3bit, gptq-ada-3bit, spqr-ada-3bit, or -4bit: each layer chooses a group axis",
    )
    parser.add_argument(
        "--bits-per-weight",
        type=float,
        metavar="X",
        help="a budget over the whole model, such as 3.5; sensitive layers get more of it",
    )
    parser.add_argument(
        "--both-axes",
        action="store_true",
        help="with --bits-per-weight: groups may run along outputs, too; better, but such layers "
        "run slowly as yet",
    )
    parser.add_argument(
        "--head-bits",
        type=int,
        metavar="B",
        help="bits of the token table and the output head, 2 to 8; 8 lose next to nothing; "
        "default 16",
    )
    parser.add_argument("--plan", type=Path, metavar="FILE", help="rules in YAML or JSON instead")
    parser.add_argument(
        "--calibration",
        default="builtin",
        metavar="NAME|FILE",
        help="builtin, wikitext2, c4, ptb, pile-val, or a .txt, .jsonl or .parquet file; "
        "default builtin",
    )
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="segments; default 64")
    parser.add_argument("--seqlen", type=int, metavar="L", help="tokens per segment; default 512")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="multiply in bfloat16 while calibrating: faster where the processor can",
    )
    parser.add_argument(
        "--max-ram",
        type=float,
        metavar="GB",
        help="activations kept in memory before they go to disk; default a quarter of the memory",
    )


def _add_eval(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "eval",
        "Perplexity of a float or quantized model, and its closeness to a reference.",
        "  quantine eval demo --window 1024 --limit 8\n"
        "  quantine eval out --text wiki.test.txt --json out.json\n"
        "  quantine eval out --reference demo",
    )
    parser.add_argument("model", metavar="MODEL|OUT", help=MODEL_HELP)
    parser.add_argument(
        "--text",
        default="builtin",
        metavar="FILE|NAME",
        help="builtin (its held-out part), wikitext2, c4, ptb, pile-val, or a .txt (verbatim), "
        ".jsonl or .parquet file; default builtin",
    )
    parser.add_argument("--window", type=int, metavar="N", help="tokens per window; default 2048")
    parser.add_argument("--limit", type=int, metavar="N", help="windows used at most")
    parser.add_argument("--reference", metavar="MODEL", help="also KL divergence and top-1 to it")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_generate(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "generate",
        "Continue a prompt, token by token.",
        '  quantine generate out "The capital of France is"\n'
        '  quantine generate out "Explain rainbows." --chat --tokens 200',
    )
    parser.add_argument("model", metavar="MODEL|OUT", help=MODEL_HELP)
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="at most; default 64")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the chat template")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy; default 0"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of sampling; default 0")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")


def _add_inspect(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "inspect",
        "What a quantized directory holds, counted from its files.",
        "  quantine inspect out\n  quantine inspect out --json out.json\n"
        "  quantine inspect out --plot pictures",
    )
    parser.add_argument("directory", metavar="OUT", type=Path, help="a quantized directory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="DIR",
        help="draw sensitivity and outliers of every matrix, and errors and sizes by block",
    )


def _add_bench(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "bench",
        "Time a quantized directory on this machine: matrices, prompts and tokens.",
        "  quantine bench out\n  quantine bench out --against bfloat16 --json speed.json",
    )
    parser.add_argument("directory", metavar="OUT", type=Path, help="a quantized directory")
    parser.add_argument(
        "--against",
        metavar="float32|bfloat16|MODEL",
        help="also time its weights as floats under transformers, or another model, by turns",
    )
    parser.add_argument(
        "--context",
        type=int,
        nargs="+",
        default=[128, 2048],
        metavar="N",
        help="tokens before those that are decoded; default 128 and 2048",
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
