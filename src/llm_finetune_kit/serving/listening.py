"""Before anything is loaded: whether a server can be had here, and a socket for it that does not listen yet."""

from __future__ import annotations

import errno
import socket
from importlib.util import find_spec

from llm_finetune_kit.errors import BusyError, MachineError, UsageError

INSTALL = "pip install 'llm-finetune-kit[serve]'"


def check_installed() -> None:
    """Raise MachineError where a package of the extra `serve` is missing."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise MachineError(51, f"serving needs {' and '.join(missing)}", fix=INSTALL)


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address that does not listen yet. Raises UsageError, BusyError or MachineError, with what can be done."""
    host = host.strip("[]")
    if not 0 <= port <= 65535:
        raise UsageError(44, f"there is no port {port}", where="--port", fix="name one from 1024 to 65535, or 0 for any")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        raise _no_address(host, port, error) from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(place)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            fix = f"choose another: --port {port + 1}, or --port 0 for any that is free"
            raise BusyError(20, f"port {port} is taken by another program", where=host, fix=fix) from None
        raise _no_address(host, port, error) from None
    return found


def _no_address(host: str, port: int, error: Exception) -> MachineError:
    fix = "ports below 1024 are for root: --port 8000" if isinstance(error, PermissionError) else "try --host 127.0.0.1"
    problem = f"cannot listen there: {getattr(error, 'strerror', None) or error}"
    return MachineError(50, problem, where=f"{host} port {port}", fix=fix)


def address_of(listener: socket.socket) -> str:
    """Where the server is reached from this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
