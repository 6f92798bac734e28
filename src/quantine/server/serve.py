"""Running the server until it is told to end."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from quantine.errors import PlanError

if TYPE_CHECKING:
    import uvicorn

    from quantine.server.engine import Engine


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to.

    Args:
        host: a name or address of this machine.
        port: 0 takes a free one.

    Raises:
        PlanError: it cannot be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        raise PlanError(
            f"cannot listen at {host}, port {port} ({error}): choose another --port or --host"
        ) from error


def url_of(listener: socket.socket) -> str:
    """What clients call the base URL of a server behind ``listener``."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def make_server(engine: Engine) -> uvicorn.Server:
    """A server of ``engine``, to be run with a socket of `listen`."""
    import uvicorn

    from quantine.server.app import make_app

    server: uvicorn.Server
    app = make_app(engine, lambda: server.should_exit)
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, lifespan="off"
    )
    server = uvicorn.Server(config)
    return server


def serve(engine: Engine, listener: socket.socket) -> None:
    """Answer clients until Ctrl-C. Who waits for an answer then gets an error instead."""
    with contextlib.suppress(KeyboardInterrupt):  # raised once all has ended
        make_server(engine).run(sockets=[listener])
