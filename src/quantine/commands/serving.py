"""The verb `serve`."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from typing import Any, Final

from quantine.commands.arguments import DTYPES, MODEL_HELP, add_device, add_verb

NEEDED: Final = ("starlette", "uvicorn")
"""Libraries of the extra `serve`."""


def add(verbs: Any) -> None:
    """Add the verb and its options to the subparsers ``verbs``."""
    parser = add_verb(
        verbs,
        "serve",
        _run,
        "Serve a model to clients of OpenAI's API, on this machine, until Ctrl-C.",
        "  quantine serve out\n  quantine serve out --port 9000 --context 8192",
    )
    parser.add_argument("model", metavar="MODEL|OUT", help=MODEL_HELP)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="NAME",
        help="address to listen at; default 127.0.0.1, which other machines do not reach; anybody "
        "who reaches another one can ask",
    )
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0 takes a free one; default 8000"
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of prompt and answer at most, which take memory; default 4096, or what the "
        "model has room for",
    )
    parser.add_argument(
        "--together",
        type=int,
        default=4,
        metavar="N",
        help="answers that are made at the same time, each with room for the context; other "
        "requests wait; default 4",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")
    add_device(parser)


def _run(arguments: argparse.Namespace) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        from quantine.errors import QuantineError

        raise QuantineError(f"serve needs {' and '.join(missing)}: pip install 'quantine[serve]'")
    import torch

    from quantine.server.engine import Engine
    from quantine.server.serve import listen, serve, url_of

    with listen(arguments.host, arguments.port) as listener:
        dtype = getattr(torch, arguments.dtype)
        engine = Engine(
            arguments.model,
            arguments.context,
            dtype,
            arguments.device,
            log=sys.stderr,
            places=arguments.together,
        )
        print(f"{engine.name} at {url_of(listener)}, Ctrl-C ends it", flush=True)
        serve(engine, listener)
    print("ended")
