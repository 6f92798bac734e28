"""The command line: parses arguments, calls the command, prints errors."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Final

from quantine import __version__
from quantine.commands import (
    comparison,
    evaluation,
    exchange,
    families,
    generation,
    inspection,
    memory,
    quantization,
    report,
    resumption,
    serving,
    sharing,
    timing,
)
from quantine.commands.standard_streams import checked_streams
from quantine.errors import OutputError, QuantineError

EXIT_REFUSED: Final = 2
"""Exit status after a `QuantineError`, which is also that of ``argparse`` for wrong arguments."""
EXIT_INTERRUPTED: Final = 130
"""Exit status after Ctrl-C: 128 plus the number of SIGINT, as shells report it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of one command and return its exit status.

    The status is 0; 1 for a verdict below its floor; 2 for an error of quantine, whose message is
    printed; 130 for an interruption.

    Args:
        argv: the arguments after the program's name; those of this process if ``None``.
    """
    with checked_streams():
        try:
            status = _run(argv)
        except QuantineError as error:
            _say(str(error))
            status = EXIT_REFUSED
        except KeyboardInterrupt:
            _say("interrupted; --resume continues a run")
            status = EXIT_INTERRUPTED
    return status


def _run(argv: Sequence[str] | None) -> int:
    """Run one command; what it printed has arrived when this returns."""
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit:  # after help, or what is wrong with the arguments
        _flush()
        raise
    _quiet_libraries()
    _let_threads_sleep()
    status: int | None = arguments.run(arguments)
    _flush()
    return status or 0


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _say(message: str) -> None:
    """Print a message on standard error, or nothing where that cannot be written either."""
    with contextlib.suppress(OutputError):
        sys.stdout.flush()
    with contextlib.suppress(OutputError):
        print(f"quantine: {message}", file=sys.stderr, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line, with one subparser per command.

    Building it, and parsing, import neither torch nor transformers.
    """
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
    for command in (
        quantization,
        resumption,
        evaluation,
        comparison,
        report,
        generation,
        serving,
        inspection,
        exchange,
        sharing,
        memory,
        families,
        timing,
    ):
        command.add(verbs)
    return parser


def _quiet_libraries() -> None:
    """Keep other libraries' progress bars and hints out of this program's output."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _let_threads_sleep() -> None:
    """Let OpenMP's threads, with which PyTorch computes, sleep while they wait for work.

    Else they look for work without sleeping, and so take processors from the threads of the native
    kernels and from other programs. OpenMP reads this when PyTorch is loaded, which is later.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


if __name__ == "__main__":
    sys.exit(main())
