"""The guard before whatever listens on a port, the browser page as well as the chat API: an ASGI application around one.

    app = Guard(app, Rules(host="127.0.0.1", browser=True))

It asks of every request, in this order, and answers itself where one fails:

    Host      names this machine (421): a page elsewhere cannot reach us under its own name (DNS rebinding)
    origin    is this site, or one of the allowed ones (403): other sites cannot act in a visitor's name
    token     is right, where one is set (401; 429 after five wrong ones); on any address but loopback one must be set
    body      is not larger (413) and not slower (408) than allowed, whatever length it claims to have

Every answer carries the security headers, and none says what runs here. Bodies and answers pass through piece by
piece: nothing is held back, so uploads, streams and server-sent events work as without it.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import parse_qs

from llm_finetune_kit.errors import UsageError
from llm_finetune_kit.serving.access import Lock, bearer, check_token
from llm_finetune_kit.serving.addresses import address, host_and_port, is_loopback, origin_named, same_origin
from llm_finetune_kit.serving.exchange import App, Exchange, Headers, Receive, Refusal, Scope, Send

MEGABYTE = 1 << 20
LOGIN = "/login"
LOGIN_BODY = 4096  # bytes of a login form, at most

# What a page may load and who may frame it. Gradio's page has scripts and styles inline, makes workers and pictures of
# blobs, and compiles what event listeners say in `js=`; all from this server, and nothing from anywhere else.
PAGE = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
FORM = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Whom the guard lets in, and what they may send. Raises UsageError for rules that protect nothing.

    `host` is the address the server is bound to. `token` is needed where that is not loopback, and asked of everybody
    where it is set. `names` are other host names that requests may use; `origins` are the sites whose scripts may
    call this one (CORS). `browser` is for pages that people look at: it adds a login form with a cookie.
    """

    host: str = "127.0.0.1"
    token: str | None = field(default=None, repr=False)
    names: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    browser: bool = False
    max_body: int = 4 * MEGABYTE

    def __post_init__(self) -> None:
        if self.token is not None:
            check_token(self.token, "token")
        elif not is_loopback(self.host.strip("[]").lower()):
            problem = f"{self.host or 'every address'} can be reached from other machines, and no token is set"
            fix = "name a file with a token: --token-file FILE; or stay on this machine: --host 127.0.0.1"
            raise UsageError(40, problem, where="--host", fix=fix)
        for origin in self.origins:
            if origin_named(origin) is None:
                why = "any site could use this server in a visitor's name" if origin == "*" else ""
                fix = "name each site by scheme, host and port, for example http://localhost:3000"
                raise UsageError(43, f"{origin} is no origin", where="--cors", why=why, fix=fix)

    @cached_property
    def allowed_origins(self) -> frozenset[str]:
        """`origins` in one spelling."""
        return frozenset(found for origin in self.origins if (found := origin_named(origin)))

    @cached_property
    def _known_names(self) -> frozenset[str]:
        own = () if is_loopback(self.host) else (self.host, socket.gethostname(), socket.getfqdn())
        return frozenset(name.strip("[]").rstrip(".").lower() for name in (*own, *self.names))

    def allows_host(self, header: str) -> bool:
        """Whether a `Host` header means this machine. Addresses cannot be rebound by DNS, so all are good where one is bound."""
        found = host_and_port(header)
        if found is None:
            return False
        here = is_loopback(found[0]) or found[0] in self._known_names
        return here or (not is_loopback(self.host) and address(found[0]) is not None)


class Guard:
    """An ASGI application that lets through to `app` what the rules allow."""

    def __init__(self, app: App, rules: Rules) -> None:
        self.app = app
        self.rules = rules
        self.lock = None if rules.token is None else Lock(rules.token)
        self.log = logging.getLogger(__name__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "http":
            headers = Headers(scope)
            exchange = Exchange(headers, receive, send, self.rules.max_body, self._security_headers(headers))
            try:
                await self._http(scope, headers, exchange)
            except Refusal as refusal:
                await exchange.refuse(refusal)
            except Exception:
                await self._failed(exchange)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, headers: Headers, exchange: Exchange) -> None:
        self._check_host(headers)
        self._check_origin(scope, headers)
        if scope["method"] == "OPTIONS" and headers.first("access-control-request-method"):
            return await exchange.answer(204, b"", self._preflight(headers))
        if self.lock is not None:
            if self.rules.browser and scope["path"] == LOGIN and scope["method"] == "POST":
                return await self._login(scope, exchange)
            if not self._has_token(scope, headers):
                return await self._ask_for_token(scope, headers, exchange)
        exchange.check_length()
        await self.app(scope, exchange.receive, exchange.send)
        exchange.check_complete()

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope)
        try:
            self._check_host(headers)
            self._check_origin(scope, headers)
            if not self._has_token(scope, headers):
                raise Refusal(401, "the token is missing or wrong")
        except Refusal:
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        await self.app(scope, receive, send)

    async def _failed(self, exchange: Exchange) -> None:
        """What went wrong inside is for the log; a client that has left needs no answer."""
        if exchange.gone or exchange.refused:
            return
        self.log.exception("a request failed")
        if exchange.started:
            raise ConnectionAbortedError("the answer was broken off") from None  # the server closes the connection
        await exchange.refuse(Refusal(500, "something went wrong here; the server's log says what", kind="server_error"))

    # --- who asks -------------------------------------------------------------------------------------------

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.all("host")
        if len(hosts) != 1 or not self.rules.allows_host(hosts[0]):
            raise Refusal(421, "this server does not answer to that host name")

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """Refuse what another site's page sends. Only following a link to here is no act of that site."""
        named = headers.all("origin")
        origins = [origin_named(text) for text in named]
        allowed = len(named) == 1 and origins[0] in self.rules.allowed_origins
        same = all(origin is not None and same_origin(origin, headers.first("host")) for origin in origins)
        site = headers.first("sec-fetch-site").lower()
        link = not named and (headers.first("sec-fetch-mode"), headers.first("sec-fetch-dest")) == ("navigate", "document")
        reads = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
        if not allowed and not (same and (site in ("", "same-origin", "none") or (link and reads))):
            raise Refusal(403, "requests that come from other sites are not answered")

    def _has_token(self, scope: Scope, headers: Headers) -> bool:
        if self.lock is None or (self.rules.browser and self.lock.opens_by_cookie(headers.all("cookie"))):
            return True
        token = bearer(headers.first("authorization"))
        return token is not None and self._tries(scope, token)

    def _tries(self, scope: Scope, token: bytes) -> bool:
        """Whether the token is right. Raises Refusal while its address has to wait."""
        assert self.lock is not None
        client = (scope.get("client") or ("",))[0]
        wait = self.lock.attempts.wait(client)
        if wait:
            seconds = str(int(wait) + 1)
            raise Refusal(
                429, "too many wrong tokens; try again later", headers=[("retry-after", seconds)], code="too_many_tokens"
            )
        if self.lock.opens(token):
            self.lock.attempts.forget(client)
            return True
        self.lock.attempts.note_wrong(client)
        return False

    async def _ask_for_token(self, scope: Scope, headers: Headers, exchange: Exchange) -> None:
        if self.rules.browser and scope["method"] in ("GET", "HEAD") and "text/html" in headers.first("accept"):
            return await self._show_form(exchange, 401)
        named = [("www-authenticate", "Bearer")]
        raise Refusal(401, "the token is missing or wrong", headers=named, kind="authentication_error", code="invalid_api_key")

    async def _login(self, scope: Scope, exchange: Exchange) -> None:
        body = await exchange.read(LOGIN_BODY)
        token = parse_qs(body.decode("latin-1")).get("token", [""])[0].strip()
        try:
            right = self._tries(scope, token.encode())
        except Refusal as refusal:
            return await self._show_form(exchange, refusal.status, "Too many wrong tokens. Try again later.", refusal.headers)
        if not right:
            return await self._show_form(exchange, 401, "This is not the token.")
        assert self.lock is not None
        cookie = self.lock.cookie(secure=scope.get("scheme") == "https")
        await exchange.answer(303, b"", [("location", "/"), ("set-cookie", cookie), ("cache-control", "no-store")])

    async def _show_form(
        self, exchange: Exchange, status: int, fault: str = "", headers: list[tuple[str, str]] | None = None
    ) -> None:
        kind = ("content-type", "text/html; charset=utf-8")
        page = LOGIN_PAGE.replace("<!-- fault -->", fault and f'<p role="alert">{fault}</p>').encode()
        policy = ("content-security-policy", FORM)
        await exchange.answer(status, page, [kind, policy, ("cache-control", "no-store"), *(headers or [])])

    # --- what answers carry ---------------------------------------------------------------------------------

    def _security_headers(self, headers: Headers) -> list[tuple[str, str]]:
        found = [
            ("content-security-policy", PAGE if self.rules.browser else NOTHING),
            ("x-content-type-options", "nosniff"),
            ("x-frame-options", "DENY"),
            ("referrer-policy", "no-referrer"),
            ("cross-origin-opener-policy", "same-origin"),
            ("cross-origin-resource-policy", "same-origin"),
        ]
        if self.rules.origins:
            found.append(("vary", "Origin"))
            origin = headers.first("origin")
            if origin_named(origin) in self.rules.allowed_origins:
                found += [("access-control-allow-origin", origin), ("access-control-expose-headers", "Retry-After")]
        return found

    def _preflight(self, headers: Headers) -> list[tuple[str, str]]:
        """What a script of an allowed site may do. It never gets the visitor's cookies."""
        if origin_named(headers.first("origin")) not in self.rules.allowed_origins:
            return []
        allowed = ("access-control-allow-headers", "Authorization, Content-Type")
        return [("access-control-allow-methods", "GET, POST"), allowed, ("access-control-max-age", "600")]


# The `meta` lets the browser name this site as the origin of the form; other sites learn nothing by it.
LOGIN_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="referrer" content="same-origin">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Sign in</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { display: grid; place-items: center; min-height: 90vh; margin: 0 }
form { display: grid; gap: .75rem; width: min(22rem, 88vw) }
h1 { font-size: 1.25rem; margin: 0 }
p { margin: 0 }
input, button { font: inherit; padding: .5rem .75rem; border-radius: .375rem; border: 1px solid GrayText }
[role=alert] { color: light-dark(#b00020, #ff8a80) }
</style></head><body><form method="post" action="/login">
<h1>LLM Finetune Kit</h1>
<label for="token">Token (in the file that the server was started with)</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<!-- fault --><button>Sign in</button></form></body></html>
"""
