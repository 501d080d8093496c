"""Request checks of the labelling server: hosts, origins and body sizes, and the security headers of every response."""

from __future__ import annotations

import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_jax.data.jsonl import parse_row
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.address import Address

MOST_BYTES = 256 * 1024
MOST_WRONG = 100

# Scripts and styles are files of this origin, never inline. Scripts write only text into the page, which browsers with
# trusted types enforce.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


class Refused(Exception):
    """A rejected request, answered with the HTTP status `status` (4xx)."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class WrongTokens:
    """Limit on the wrong tokens of each client, by its address.

    Beyond it, the client's tokens are no longer looked up until a minute has passed, but for those that were right
    before: behind a proxy, all labellers have one address.
    """

    def __init__(self) -> None:
        self._wrong: dict[str, list[float]] = {}
        self._right: set[str] = set()

    def refuse(self, client: str, token: str) -> None:
        """Raises Refused for a client with too many wrong tokens in the last minute."""
        if len(self._recent(client)) >= MOST_WRONG and token not in self._right:
            raise Refused(429, "too many wrong tokens from this address; wait a minute")

    def count(self, client: str, token: str, *, right: bool) -> None:
        """Counts a token that was looked up."""
        if right:
            self._right.add(token)
            return
        self._right.discard(token)
        self._wrong[client] = [*self._recent(client), time.monotonic()]
        if len(self._wrong) > 10_000:
            self._wrong = {each: times for each in self._wrong if (times := self._recent(each))}

    def _recent(self, client: str) -> list[float]:
        since = time.monotonic() - 60
        return [at for at in self._wrong.get(client, ()) if at > since]


class Guard:
    """Middleware that rejects foreign hosts and cross-origin posts, and adds the security headers to every response.

    A page of another site can make a browser post here (CSRF), which shows in the origin; or it can point a domain name
    to this machine (DNS rebinding), which shows in the host.
    """

    def __init__(self, app: ASGIApp, address: Address) -> None:
        self.app, self.address = app, address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        words = self._wrong(scope["method"], Headers(scope=scope))
        if words:
            await JSONResponse({"error": words}, 403)(scope, receive, send_guarded)
        else:
            await self.app(scope, receive, send_guarded)

    def _wrong(self, method: str, headers: Headers) -> str:
        # Names of hosts have no case; a request without one cannot be told from one for another site.
        host = headers.get("host", "").lower()
        if not host or (self.address.hosts is not None and host not in self.address.hosts):
            return "this host name is not served here"
        if method in ("GET", "HEAD"):
            return ""
        origin = headers.get("origin")
        if origin is not None and origin not in {self.address.origin or f"http://{host}", f"http://{host}"}:
            return "posts from other origins are rejected"
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return "posts from other sites are rejected"
        # Browsers send the origin with every post; other clients send neither origin nor cookie.
        if origin is None and "cookie" in headers:
            return "a post with a cookie requires an origin"
        return ""


async def read_body(request: Request) -> dict[str, Any]:
    """Read the JSON object of a post.

    Raises:
      Refused: for another content type, too many bytes, or a body that is not a JSON object.
    """
    body = await read_bytes(request, "application/json", MOST_BYTES)
    try:
        return parse_row(body, "body")
    except UserError as error:
        raise Refused(400, str(error)) from None


async def read_bytes(request: Request, content_type: str, most: int) -> bytes:
    """Read the body of a post.

    Raises:
      Refused: for another content type, or more than `most` bytes.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != content_type:
        raise Refused(415, f"content-type: expected {content_type}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise Refused(413, f"body: expected at most {most} bytes, got more")
    return bytes(body)


def text_field(body: dict[str, Any], name: str) -> str:
    """A field of a post with a short text.

    Raises:
      Refused: if there is none.
    """
    value = body.get(name)
    if not isinstance(value, str) or not 1 <= len(value) <= 100:
        raise Refused(400, f"{name}: expected text of 1 to 100 characters")
    return value
