"""The guard before the page and the API: who is let in, what may be sent, what answers carry. Numbers are those of FAULTS.md."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from asgi import Answer, ask, running
from chromium import PROGRAM
from llm_finetune_kit.errors import UsageError
from llm_finetune_kit.serving import exchange
from llm_finetune_kit.serving.access import REMEMBERED, WAIT, Attempts, new_token, read_token
from llm_finetune_kit.serving.guard import Guard, Rules
from llm_finetune_kit.serving.listening import bound

TOKEN = "correct-horse-battery"
OTHER = "another-session-token"
HOSTS = {
    "localhost": True,
    "localhost:7860": True,
    "LOCALHOST.": True,
    "LocalHost.:80": True,
    "127.0.0.1:9": True,
    "127.8.9.1": True,
    "[::1]": True,
    "[::1]:7860": True,
    "[::ffff:127.0.0.1]:1": True,
    "evil.example": False,
    "localhost.evil.example": False,
    "127.0.0.1.evil.example": False,
    "evil.example:7860": False,
    "192.168.0.7": False,
    "[fe80::1]": False,
    "0.0.0.0": False,
    "user@localhost": False,
    "localhost:80:80": False,
    "localhost/": False,
    "[::1": False,
    "": False,
}
FOREIGN = [
    {"origin": "null"},
    {"origin": "http://evil.example"},
    {"origin": "http://localhost:3000"},
    {"origin": "http://localhost.evil.example:7860"},
    {"origin": "file://"},
    {"origin": ""},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
    {"sec-fetch-site": "same-origin", "origin": "null"},
    {"sec-fetch-site": "cross-site", "origin": "http://localhost:7860"},
]


class Inside:
    """An application that notes what reaches it, and tells too much about itself."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.bytes = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append(scope["path"])
        if scope["type"] == "websocket":
            return await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "http.request":
            self.bytes += len(message["body"])
            if not message["more_body"]:
                break
        if scope["path"] == "/broken":
            raise ValueError("/secret/place version 1.2.3")
        headers = [(b"Server", b"inside/1.2.3"), (b"x-powered-by", b"python"), (b"access-control-allow-origin", b"*")]
        headers += [(b"access-control-allow-credentials", b"true"), (b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 404 if scope["path"] == "/nothing" else 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"inside"})


def guarded(**rules: Any) -> tuple[Guard, Inside]:
    inside = Inside()
    return Guard(inside, Rules(**rules)), inside


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def login(guard: Guard, token: str, client: str = "127.0.0.1") -> Answer:
    form = {"content-type": "application/x-www-form-urlencoded", "origin": "http://localhost:7860"}
    return ask(guard, "POST", "/login", form, f"token={token}".encode(), client=client)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", "", "[::]", "127.0.0.1.example.org"])
def test_fault_100_no_other_address_than_loopback_without_a_token(host: str) -> None:
    with pytest.raises(UsageError, match="no token is set"):
        Rules(host=host)
    assert TOKEN not in repr(Rules(host=host, token=TOKEN))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.0.0.2"])
def test_fault_100_loopback_needs_no_token(host: str) -> None:
    Rules(host=host)
    with bound("127.0.0.1", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_fault_101_only_names_of_this_machine_are_answered() -> None:
    guard, inside = guarded()
    for host, good in HOSTS.items():
        assert ask(guard, headers={"host": host}).status == (200 if good else 421), host
    assert ask(guard, headers=[("host", "localhost"), ("host", "evil.example")]).status == 421
    assert ask(guard, kind="websocket", headers={"host": "evil.example"}).status == 403
    assert len(inside.reached) == sum(HOSTS.values())


def test_fault_101_a_server_for_others_answers_to_addresses_and_its_own_names() -> None:
    guard, _ = guarded(host="0.0.0.0", token=TOKEN, names=("Models.Example",))
    for host, good in {"192.168.0.7:8000": True, "[fe80::1]": True, "models.example.": True, "evil.example": False}.items():
        assert ask(guard, headers={"host": host, **bearer(TOKEN)}).status == (200 if good else 421), host
    assert ask(guard, headers={"host": socket.gethostname(), **bearer(TOKEN)}).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "GET", "OPTIONS"])
def test_fault_102_other_sites_reach_nothing(method: str) -> None:
    guard, inside = guarded(browser=True)
    for headers in FOREIGN:
        assert ask(guard, method, "/run", headers, b"x").status == 403, headers
        assert ask(guard, kind="websocket", headers=headers).status == 403, headers
    assert inside.reached == []
    own = {"origin": "http://LOCALHOST:7860", "sec-fetch-site": "same-origin"}
    assert ask(guard, method, "/run", own).status == ask(guard, method, "/run").status == 200
    assert ask(guard, kind="websocket", headers=own).status == 101


def test_fault_102_a_link_from_another_site_may_be_followed_but_sends_nothing() -> None:
    guard, _ = guarded(browser=True)
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert ask(guard, "GET", "/", link).status == 200
    assert ask(guard, "POST", "/", link).status == 403


def test_fault_103_only_the_token_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    right = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or right(a, b))
    guard, inside = guarded(token=TOKEN, browser=True)
    other = login(guarded(token=OTHER, browser=True)[0], OTHER).headers["set-cookie"].partition(";")[0]
    ours = login(guard, TOKEN).headers["set-cookie"].partition(";")[0]
    stolen = f"{ours.partition('=')[0]}={other.partition('=')[2]}"
    wrong = [{}, bearer(OTHER), bearer(TOKEN[:-1]), bearer(TOKEN + "x"), {"authorization": TOKEN}]
    wrong += [{"authorization": f"Basic {TOKEN}"}, {"cookie": other}, {"cookie": stolen}, {"cookie": f"{ours}x"}]
    for headers in wrong:
        guard.lock.attempts.forget("127.0.0.1")
        found = ask(guard, "POST", "/run", headers)
        assert (found.status, found.headers["www-authenticate"]) == (401, "Bearer"), headers
        assert json.loads(found.body)["error"]["code"] == "invalid_api_key"
        assert ask(guard, kind="websocket", headers=headers).status == 403
    assert ask(guard, query=f"token={TOKEN}").status == 401  # in an address it opens nothing
    assert inside.reached == []
    assert {OTHER.encode(), TOKEN[:-1].encode(), TOKEN.encode()} <= set(compared)
    for headers in (bearer(TOKEN), {"authorization": f"bearer  {TOKEN}"}, {"cookie": f"a=b; {ours}"}):
        assert ask(guard, "POST", "/run", headers).status == 200
    assert ask(guarded(token=TOKEN)[0], headers={"cookie": ours}).status == 401  # an API takes no cookie


def test_fault_103_tokens_that_can_be_guessed_are_refused(tmp_path: Path) -> None:
    for text in ("", "short", "with spaces in the middle", "ümläute-und-mehr-davon"):
        (tmp_path / "token").write_text(text, encoding="utf-8")
        with pytest.raises(UsageError) as caught:
            read_token(tmp_path / "token")
        assert not text or text not in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read"):
        read_token(tmp_path / "missing")
    (tmp_path / "token").write_text(f"{new_token()}\n")
    assert len(read_token(tmp_path / "token")) == 43


def test_fault_104_after_five_wrong_tokens_an_address_waits() -> None:
    guard, inside = guarded(token=TOKEN, browser=True)
    now = [100.0]
    guard.lock.attempts = Attempts(lambda: now[0])
    cookie = login(guard, TOKEN).headers["set-cookie"].partition(";")[0]
    tried = [login(guard, "wrong").status if turn % 2 else ask(guard, headers=bearer("wrong")).status for turn in range(5)]
    assert tried == [401] * 5
    refused = ask(guard, headers=bearer(TOKEN))  # the right one tells nobody that it is right
    assert (refused.status, refused.headers["retry-after"]) == (429, "61")
    assert login(guard, TOKEN).status == 429
    assert inside.reached == []
    assert ask(guard, headers={"cookie": cookie}).status == 200  # whoever is in stays in
    assert ask(guard, headers=bearer(TOKEN), client="127.0.0.9").status == 200
    now[0] += WAIT
    assert ask(guard, headers=bearer(TOKEN)).status == 200


def test_fault_104_an_attacker_with_many_addresses_is_one_network_and_fills_no_memory() -> None:
    attempts = Attempts(lambda: 0.0)
    for number in range(5):
        attempts.note_wrong(f"2001:db8:1:2:{number}::1")
    assert attempts.wait("2001:db8:1:2:ffff::9") > 0
    assert attempts.wait("2001:db8:1:3::1") == 0
    for number in range(2 * REMEMBERED):
        attempts.note_wrong(f"10.0.{number // 256}.{number % 256}")
    assert len(attempts._wrong) == REMEMBERED


def test_fault_105_the_cookie_is_out_of_reach_and_the_token_is_told_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    guard, _ = guarded(token=TOKEN, browser=True)
    found = login(guard, TOKEN)
    parts = found.headers["set-cookie"].split("; ")
    assert found.status == 303
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(parts)
    ask(guard, "POST", "/broken", bearer(TOKEN))
    form = ask(guard, headers={"accept": "text/html"})
    assert form.status == 401
    assert b"<form" in form.body
    answers = [found, form, login(guard, "wrong"), ask(guard, "GET", "/", bearer(OTHER))]
    told = caplog.text + "".join(f"{one.headers}{one.body!r}" for one in answers)
    assert TOKEN not in told
    assert found.headers["location"] == "/"
    assert {one.headers["referrer-policy"] for one in answers} == {"no-referrer"}


def on_a_port(app: Any) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(app, lifespan="off", ws="none", log_level="critical", server_header=False))


def raw(port: int, head: str, pieces: list[bytes], pause: float = 0.0) -> bytes:
    """What a server says to a request that is sent piece by piece, as long as it listens."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        line.sendall(f"{head}\r\nHost: localhost\r\n\r\n".encode())
        line.setblocking(False)
        for piece in pieces:
            time.sleep(pause)
            try:
                line.setblocking(True)
                line.sendall(piece)
            except OSError:
                break
        line.settimeout(20)
        found = b""
        try:
            while part := line.recv(65536):
                found += part
        except ConnectionResetError:
            pass
    return found


def test_fault_108_bodies_are_cut_at_the_limit_and_slow_ones_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    guard, inside = guarded(max_body=1 << 20)
    piece = b"%x\r\n" % (1 << 16) + b"x" * (1 << 16) + b"\r\n"
    with running(lambda: on_a_port(guard)) as port:
        claimed = raw(port, "POST / HTTP/1.1\r\nContent-Length: 100000000", [b"x" * 65536])
        assert claimed.startswith(b"HTTP/1.1 413")
        assert inside.reached == []
        endless = raw(port, "POST / HTTP/1.1\r\nTransfer-Encoding: chunked", [piece] * 40)
        assert endless.startswith(b"HTTP/1.1 413")
        assert b"request_too_large" in endless
        assert inside.bytes <= 1 << 20
        whole = raw(port, "POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 3", [b"abc"])
        assert whole.startswith(b"HTTP/1.1 200")
        assert b"server:" not in whole.lower() + endless.lower()
        monkeypatch.setattr(exchange, "GRACE", 0.4)
        monkeypatch.setattr(exchange, "LINGER", 0.5)
        slow = raw(port, "POST / HTTP/1.1\r\nContent-Length: 1000", [b"x"] * 4, pause=0.3)
        assert slow.startswith(b"HTTP/1.1 408")


def test_fault_108_the_server_answers_others_while_clients_dawdle() -> None:
    guard, _ = guarded()
    with running(lambda: on_a_port(guard)) as port:
        dawdling = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
        for number, line in enumerate(dawdling):
            line.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\n" + (b"Content-Length: 9\r\n\r\nx" if number % 2 else b""))
        began = time.monotonic()
        assert raw(port, "GET / HTTP/1.1\r\nConnection: close", []).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - began < exchange.GRACE / 2, "it waits for none of them"
        for line in dawdling:
            line.close()


def test_an_answer_in_pieces_is_handed_on_as_it_comes() -> None:
    async def work() -> None:
        seen = asyncio.Event()

        async def in_pieces(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
            await asyncio.wait_for(seen.wait(), 5)  # the second piece is made when the first has arrived
            await send({"type": "http.response.body", "body": b"second"})

        async def send(message: Any) -> None:
            if message.get("body") == b"first":
                seen.set()

        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
        await Guard(in_pieces, Rules())(scope, asyncio.Event().wait, send)

    asyncio.run(work())


def test_fault_118_no_site_may_call_unless_it_is_named() -> None:
    site = {"origin": "https://Tools.Example:443", "sec-fetch-site": "cross-site"}
    asks = {**site, "access-control-request-method": "POST"}
    closed = [ask(guarded()[0], "OPTIONS", "/", asks), ask(guarded()[0], "POST", "/", site), ask(guarded()[0])]
    assert [one.status for one in closed] == [403, 403, 200]
    assert not [name for one in closed for name in one.headers if name.startswith("access-control-")]

    guard, inside = guarded(origins=("https://tools.example", "http://localhost:3000"), token=TOKEN)
    before = ask(guard, "OPTIONS", "/", asks)
    assert (before.status, before.headers["access-control-allow-origin"]) == (204, "https://Tools.Example:443")
    assert inside.reached == []
    for found in (ask(guard, "POST", "/", site | bearer(TOKEN)), ask(guard, "POST", "/", site)):
        assert found.headers["access-control-allow-origin"] == "https://Tools.Example:443"
        assert "access-control-allow-credentials" not in found.headers
        assert "Origin" in found.headers["vary"]
    assert inside.reached == ["/"]  # the one with the token
    other = ask(guard, "POST", "/", {"origin": "https://other.example"} | bearer(TOKEN))
    assert (other.status, other.headers.get("access-control-allow-origin")) == (403, None)
    for wrong in ("*", "tools.example", "null", "https://tools.example/path", "ftp://tools.example"):
        with pytest.raises(UsageError, match="no origin"):
            Rules(origins=(wrong,))


def every_kind_of_answer() -> dict[int, Answer]:
    open_guard, _ = guarded(browser=True, max_body=10)
    closed, _ = guarded(browser=True, token=TOKEN)
    answers = [
        ask(open_guard),
        ask(open_guard, "GET", "/nothing"),
        ask(open_guard, "POST", "/broken"),
        ask(open_guard, "POST", "/", body=[b"x" * 6, b"x" * 6]),
        ask(open_guard, headers={"host": "evil.example"}),
        ask(open_guard, headers={"origin": "null"}),
        ask(closed, headers={"accept": "text/html"}),
        login(closed, TOKEN),
    ]
    for _ in range(6):
        answers.append(login(closed, "wrong"))
    return {one.status: one for one in answers}


def test_fault_120_no_answer_tells_what_runs_inside(caplog: pytest.LogCaptureFixture) -> None:
    answers = every_kind_of_answer()
    assert sorted(answers) == [200, 303, 401, 403, 404, 413, 421, 429, 500]
    for status, found in answers.items():
        told = f"{found.headers}{found.body!r}".lower()
        assert not [word for word in ("traceback", "secret", "1.2.3", ".py", "valueerror", "x-powered-by") if word in told], (
            status
        )
        assert "server" not in found.headers
    assert "ValueError: /secret/place" in caplog.text  # whoever runs the server is told


def test_fault_121_every_answer_carries_the_security_headers() -> None:
    for status, found in every_kind_of_answer().items():
        assert found.headers["x-content-type-options"] == "nosniff", status
        assert found.headers["referrer-policy"] == "no-referrer"
        assert found.headers["x-frame-options"] == "DENY"
        assert found.headers["cross-origin-resource-policy"] == "same-origin"
        policy = found.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy
        assert "default-src 'self'" in policy
        assert "http" not in policy and "*" not in policy  # from nowhere else
    assert ask(guarded()[0]).headers["content-security-policy"].startswith("default-src 'none'")


# A page of another port: for cookies and for `SameSite` it is the same site, so the visitor's cookie goes with its requests.
ATTACK = """<!doctype html><title>attack</title><body>
<iframe name="hole"></iframe>
<form method="post" action="{place}/act/form" target="hole"><input name="token" value="x"></form>
<img src="{place}/act/image"><iframe src="{place}/act/frame"></iframe><script src="{place}/act/script"></script>
<script>
const tries = [];
for (const [name, how] of Object.entries({{
  plain: {{method: "POST", mode: "no-cors", credentials: "include", body: "x"}},
  read: {{credentials: "include"}},
  json: {{method: "POST", credentials: "include", headers: {{"content-type": "application/json"}}, body: "{{}}"}},
}})) tries.push(fetch("{place}/act/" + name, how).catch(() => 0));
const line = new WebSocket("{place}/act/socket".replace("http", "ws"));
tries.push(new Promise(done => {{ line.onclose = line.onopen = done; }}));
document.forms[0].submit();
Promise.all(tries).then(() => setTimeout(() => document.title = "done", 300));
</script></body>"""


@pytest.mark.skipif(
    PROGRAM is None and os.environ.get("CI") != "true", reason="no chromium is installed (apt-get install chromium)"
)
def test_fault_102_103_a_browser_signs_in_and_another_port_of_the_machine_cannot_use_that() -> None:
    from playwright.sync_api import sync_playwright

    guard, inside = guarded(token=TOKEN, browser=True)

    async def attack(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": ATTACK.format(place=place).encode()})

    with running(lambda: on_a_port(guard)) as port, running(lambda: on_a_port(attack)) as other, sync_playwright() as playwright:
        place = f"http://127.0.0.1:{port}"
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page()
        assert page.goto(place).status == 401
        page.fill("#token", "not-the-right-one")
        page.click("button")
        assert "not the token" in page.inner_text("[role=alert]")
        page.fill("#token", TOKEN)
        page.click("button")
        page.wait_for_function("document.body.innerText == 'inside'")
        assert TOKEN not in page.url
        assert page.evaluate("document.cookie") == ""
        assert page.evaluate("fetch('/own', {method: 'POST'}).then(found => found.status)") == 200
        reached = list(inside.reached)
        assert "/own" in reached
        page.goto(f"http://127.0.0.1:{other}")
        page.wait_for_function("document.title == 'done'")
        browser.close()
    assert inside.reached == reached
