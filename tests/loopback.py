"""What the stand-ins for the hub's two sides have in common: an address on the loopback, and a quiet server behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TypeVar


class QuietHandler(BaseHTTPRequestHandler):
    """Answers through `_send`, which subclasses write."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(body=True)

    def do_HEAD(self) -> None:
        self._send(body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, *, body: bool) -> None:
        raise NotImplementedError


class LocalHub:
    url: str

    @property
    def environment(self) -> dict[str, str]:
        """What a child process needs to take this hub for the real one."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def handler(self) -> type[QuietHandler]:
        """Whose `served` will be this hub."""
        raise NotImplementedError


AHub = TypeVar("AHub", bound=LocalHub)


@contextmanager
def serving(hub: AHub) -> Iterator[AHub]:
    """The hub answers at `hub.url` until the block ends; then nobody answers there."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (hub.handler(),), {"served": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
