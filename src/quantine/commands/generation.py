"""The verb `generate`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from quantine.commands.arguments import DTYPES, MODEL_HELP, add_device, add_verb


def add(verbs: Any) -> None:
    """Add the verb and its options to the subparsers ``verbs``."""
    parser = add_verb(
        verbs,
        "generate",
        _run,
        "Continue a prompt, token by token, or several together.",
        '  quantine generate out "The capital of France is"\n'
        '  quantine generate out "Explain rainbows." --chat --tokens 200\n'
        '  quantine generate out "Once" "Twice" "Thrice" --tokens 20',
    )
    parser.add_argument("model", metavar="MODEL|OUT", help=MODEL_HELP)
    parser.add_argument(
        "prompts", nargs="+", metavar="PROMPT", help="text to continue; several are made together"
    )
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="at most; default 64")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the chat template")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy; default 0"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of sampling; default 0")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")
    add_device(parser)


def _run(arguments: argparse.Namespace) -> None:
    import torch

    from quantine.runtime.generate import stream

    stream(
        arguments.model,
        arguments.prompts,
        tokens=arguments.tokens,
        chat=arguments.chat,
        temperature=arguments.temperature,
        seed=arguments.seed,
        dtype=getattr(torch, arguments.dtype),
        out=sys.stdout,
        log=sys.stderr,
        device=arguments.device,
    )
