"""From a model's name to a server that answers: the model, a line of requests before it, the API, and its guard."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from llm_finetune_kit.errors import BusyError, KitError
from llm_finetune_kit.files import MANIFEST
from llm_finetune_kit.hardware import this_machine
from llm_finetune_kit.opening import Opened, open_model
from llm_finetune_kit.runs import find_result
from llm_finetune_kit.serving.answering import Answered, Line
from llm_finetune_kit.serving.api import ChatAPI
from llm_finetune_kit.serving.exchange import App
from llm_finetune_kit.serving.guard import Guard, Rules
from llm_finetune_kit.serving.listening import address_of

ENDING_SECONDS = 5  # that open connections have to end when the server is told to
TRIES = 10  # to open a run that is being written: what was newest may be gone before it is read


@dataclass(frozen=True)
class Listening:
    """The server is ready: under this address, with these models out of this folder, in this number format on this device."""

    address: str
    folder: str
    models: list[str]
    dtype: str
    device: str


Heard = Callable[[Listening | Answered], None]


def serve(model: str, rules: Rules, listener: socket.socket, *, dtype: str | None = None, heard: Heard) -> None:
    """Answer requests on a bound socket until SIGINT or SIGTERM. Tells `heard` when it listens, and of every answer."""
    machine = this_machine()
    dtype = dtype or ("bfloat16" if machine.bfloat16 else "float32")
    opened, folder = opened_whole(model, dtype=dtype, device=machine.device)
    line = Line(opened, heard)
    api = ChatAPI(opened, line)
    ready = Listening(address_of(listener), folder, api.ids, dtype, machine.device)
    server = Server(Guard(api.app(), rules), line, lambda: heard(ready))
    with _ended_by_signals():
        asyncio.run(server.serve(sockets=[listener]))


class Server(uvicorn.Server):  # type: ignore[misc]
    """uvicorn around an application, without words of its own. `ready` is called once it listens."""

    def __init__(self, app: App, line: Line, ready: Callable[[], None]) -> None:
        self._line, self._ready = line, ready
        how = {"lifespan": "off", "ws": "none", "log_config": None, "log_level": "critical", "access_log": False}
        # Headers that name another client are not believed: wrong tokens are counted by address.
        ending = {"server_header": False, "proxy_headers": False, "timeout_graceful_shutdown": ENDING_SECONDS}
        super().__init__(uvicorn.Config(app, **how, **ending))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets=sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End; the answers at work are ended first, else it would wait for them."""
        self._line.close()
        await super().shutdown(sockets=sockets)


def opened_whole(model: str, *, dtype: str, device: str) -> tuple[Opened, str]:
    """`open_model` of one committed state, also while a run writes: what is replaced while it is read is read again.

    The folder of that state comes with it (the name itself where it is none). Raises BusyError where that goes on and on.
    """
    for _ in range(TRIES):
        before = _state(model)
        try:
            opened = open_model(model, dtype=dtype, device=device)
        except (KitError, OSError):
            if _state(model) == before:  # nothing but what is there is at fault
                raise
            continue
        if _state(model) == before:
            return opened, before[0]
    fix = "wait until it has ended, or serve one of its checkpoints"
    raise BusyError(21, "the model is replaced faster than it can be read", where=model, fix=fix)


def _state(model: str) -> tuple[str, bytes]:
    """Which folder the name means now, and what its manifest says of its content."""
    folder = find_result(model)
    try:
        return str(folder), (folder / MANIFEST).read_bytes()
    except OSError:
        return str(folder), b""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Signals end the server and not the process: uvicorn sends them again when it is done, and then they mean nothing."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
