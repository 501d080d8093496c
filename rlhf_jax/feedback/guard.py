"""What stands between the network and the labelling server: hosts, origins, sizes, and the headers of every answer."""

from __future__ import annotations

import dataclasses
import ipaddress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_jax.data.jsonl import parse_row
from rlhf_jax.errors import UserError

MOST_BYTES = 32 * 1024

# Scripts and styles are files of this origin, never text in the page; what a script writes into the page is text, and a
# browser that knows trusted types lets it write nothing else.
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
    """An answer of 4xx. status: which."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Address:
    """Where the server listens, and the origin of its pages where something stands before it, such as a TLS proxy."""

    host: str
    port: int
    origin: str = ""

    def __post_init__(self) -> None:
        if self.origin:
            parts = urlsplit(self.origin)
            if parts.scheme not in ("http", "https") or self.origin != f"{parts.scheme}://{parts.netloc}":
                raise UserError(f"origin: expected an origin such as https://label.example.org, got {self.origin!r}")

    @property
    def url(self) -> str:
        """What a browser opens."""
        host = "localhost" if self.host in ("127.0.0.1", "::1") else self.host
        return self.origin or f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def private(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host) and not self.origin

    @property
    def hosts(self) -> frozenset[str] | None:
        """What the Host header may say; None for anything, since others know a machine by names that it does not."""
        own = {f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        if self.origin:
            return frozenset({*own, urlsplit(self.origin).netloc})
        return frozenset(own) if is_loopback(self.host) else None


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Middleware: refuses foreign hosts and cross-origin posts, and gives every answer its headers.

    A page of another site can make a browser post here, and a name of its own can point to this machine: the first has
    another origin, the second another host.
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
        host = headers.get("host", "")
        if self.address.hosts is not None and host not in self.address.hosts:
            return "this host is not served here"
        if method in ("GET", "HEAD"):
            return ""
        origin = headers.get("origin")
        if origin is not None and origin not in {self.address.origin or f"http://{host}", f"http://{host}"}:
            return "posts from other origins are refused"
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return "posts from other sites are refused"
        # A browser names the origin of every post; whoever does not is no browser, and brings no cookie.
        if origin is None and "cookie" in headers:
            return "a post with a cookie needs an origin"
        return ""


async def read_body(request: Request) -> dict[str, Any]:
    """The JSON object of a post. Raises: Refused for another type, too many bytes, or no such object."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "content-type: expected application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise Refused(413, f"body: expected at most {MOST_BYTES} bytes, got more")
    try:
        return parse_row(bytes(body), "body")
    except UserError as error:
        raise Refused(400, str(error)) from None
