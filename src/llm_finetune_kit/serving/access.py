"""The token that lets people in: made, read, compared, carried in a cookie, and protected from guessing."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from llm_finetune_kit.errors import UsageError
from llm_finetune_kit.serving.addresses import network_of

SHORTEST = 16  # characters of a token that a person chose
WRONG_ONES = 5  # tokens that one address may get wrong before it has to wait
WAIT = 60.0  # seconds
REMEMBERED = 1024  # addresses whose wrong tokens are counted
COOKIE = "finetune"


def new_token() -> str:
    """A token of 256 random bits, in letters that need no quoting."""
    return secrets.token_urlsafe(32)


def read_token(path: str | Path) -> str:
    """The token in a file, without white space around it. Raises UsageError, which never shows what the file holds."""
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "it is not text"
        raise UsageError(41, f"the token cannot be read: {problem}", where=str(path), fix=f"write one: {MAKE_ONE}") from None
    check_token(token, str(path))
    return token


def check_token(token: str, where: str) -> None:
    """Raise UsageError for a token that can be guessed or that no header can carry."""
    if re.fullmatch(rf"[!-~]{{{SHORTEST},}}", token) is None:
        problem = f"a token needs {SHORTEST} characters or more, of plain letters, digits and signs, without spaces"
        raise UsageError(42, problem, where=where, fix=f"make a new one: {MAKE_ONE}")


MAKE_ONE = 'python -c "import secrets; print(secrets.token_urlsafe(32))" > token.txt'


class Attempts:
    """Wrong tokens, counted for each address: after five of them it has to wait a minute, whatever it sends then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: dict[str, tuple[int, float]] = {}  # address: how many, and when the last one came

    def wait(self, client: str) -> float:
        """Seconds until this address may try again; 0 if it may now."""
        count, last = self._wrong.get(network_of(client), (0, 0.0))
        left = last + WAIT - self._clock()
        return left if count >= WRONG_ONES and left > 0 else 0.0

    def note_wrong(self, client: str) -> None:
        """Count a wrong token. Those of a minute ago are forgotten."""
        key, now = network_of(client), self._clock()
        count, last = self._wrong.pop(key, (0, now))
        self._wrong[key] = (count + 1 if now - last < WAIT else 1, now)
        while len(self._wrong) > REMEMBERED:
            del self._wrong[next(iter(self._wrong))]  # the one that was heard of longest ago

    def forget(self, client: str) -> None:
        """This address knows the token."""
        self._wrong.pop(network_of(client), None)


class Lock:
    """Compares what requests carry with the token, in a time that does not depend on how much of it is right.

    The cookie holds a digest, not the token: it is worth nothing to another server, and to this one only until the
    token changes. Its name depends on the token too, as cookies of one machine are shared by all its ports.
    """

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        digest = hmac.new(self._token, b"cookie of llm-finetune-kit", hashlib.sha256).hexdigest()
        self.cookie_name, self._cookie = f"{COOKIE}-{digest[:8]}", digest[8:]
        self.attempts = Attempts()

    def opens(self, token: bytes) -> bool:
        """Whether this is the token."""
        return hmac.compare_digest(token, self._token)

    def opens_by_cookie(self, headers: Iterable[str]) -> bool:
        """Whether one of these `Cookie` headers holds the cookie that `cookie` sets."""
        pairs = (pair.strip().partition("=") for header in headers for pair in header.split(";"))
        held = [value for name, _, value in pairs if name == self.cookie_name]
        return any(hmac.compare_digest(value.encode(), self._cookie.encode()) for value in held)

    def cookie(self, *, secure: bool) -> str:
        """The `Set-Cookie` header of a login: for this session, out of reach of scripts and of other sites."""
        return f"{self.cookie_name}={self._cookie}; Path=/; HttpOnly; SameSite=Strict" + ("; Secure" if secure else "")


def bearer(authorization: str) -> bytes | None:
    """The token of an `Authorization: Bearer TOKEN` header, or None."""
    scheme, _, token = authorization.strip().partition(" ")
    return token.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else None
