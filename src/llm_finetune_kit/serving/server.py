"""From a model's name to a server that answers: the port first, then the model, then the API behind its guard."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llm_finetune_kit.errors import BusyError, KitError, MachineError, UsageError
from llm_finetune_kit.hardware import this_machine
from llm_finetune_kit.opening import Opened, open_model
from llm_finetune_kit.serving.answering import Answered, Line
from llm_finetune_kit.serving.guard import Guard, Rules

INSTALL = "pip install 'llm-finetune-kit[serve]'"
ENDING_SECONDS = 5  # that open connections have to end when the server is told to
TRIES = 3  # to open a run that is being written: what was newest may be gone before it is read


@dataclass(frozen=True)
class Listening:
    """The server is ready: under this address, with these models, in this number format on this device."""

    address: str
    models: list[str]
    dtype: str
    device: str


Heard = Callable[[Listening | Answered], None]


def serve(model: str, rules: Rules, port: int, *, dtype: str | None = None, heard: Heard) -> None:
    """Answer requests until SIGINT or SIGTERM. Tells `heard` when it listens, and of every answer.

    Raises MachineError where the extra `serve` is missing or the address cannot be had, BusyError where the port is taken.
    """
    uvicorn = _needed()
    listener = bound(rules.host, port)
    with listener:
        machine = this_machine()
        dtype = dtype or ("bfloat16" if machine.bfloat16 else "float32")
        opened = opened_whole(model, dtype=dtype, device=machine.device)
        line = Line(opened, heard)
        from llm_finetune_kit.serving.api import ChatAPI

        api = ChatAPI(opened, line)
        config = uvicorn.Config(
            Guard(api.app(), rules),
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # anybody could write them, and wrong tokens are counted by address
            timeout_graceful_shutdown=ENDING_SECONDS,
        )
        ready = Listening(address_of(listener), api.ids, dtype, machine.device)
        with _ended_by_signals():
            asyncio.run(_serving(uvicorn, config, listener, line, lambda: heard(ready)))


async def _serving(uvicorn: Any, config: Any, listener: socket.socket, line: Line, ready: Callable[[], None]) -> None:
    class Server(uvicorn.Server):  # type: ignore[misc]
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            ready()

        async def shutdown(self, sockets: Any = None) -> None:
            line.close()  # else the answers at work would keep it waiting
            await super().shutdown(sockets=sockets)

    await Server(config).serve(sockets=[listener])


def opened_whole(model: str, *, dtype: str, device: str) -> Opened:
    """`open_model` of what a run has committed, also while it writes: where a checkpoint is rotated away, the next is taken."""
    for left in reversed(range(TRIES)):
        try:
            return open_model(model, dtype=dtype, device=device)
        except (KitError, OSError):
            if not left:
                raise
    raise AssertionError("unreachable")


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address that does not listen yet. Raises BusyError or MachineError, with what can be done."""
    host = host.strip("[]")
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


def _needed() -> Any:
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise MachineError(51, f"serving needs the package {error.name}", fix=INSTALL) from None
    return uvicorn


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Signals end the server and not the process: uvicorn sends them again when it is done, and then they mean nothing."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_port(port: int) -> int:
    """The port, if there is one of that number. Raises UsageError."""
    if not 0 <= port <= 65535:
        raise UsageError(44, f"there is no port {port}", where="--port", fix="name one from 1024 to 65535, or 0 for any")
    return port
