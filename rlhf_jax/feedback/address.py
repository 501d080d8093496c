"""Address of the labelling server, known without the packages that serve."""

from __future__ import annotations

import dataclasses
import ipaddress
from urllib.parse import urlsplit

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Address:
    """Address of the server, and the origin of its pages behind a proxy, e.g. one that terminates TLS."""

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
        """URL to open in a browser."""
        host = "localhost" if self.host in ("127.0.0.1", "::1") else self.host
        return self.origin or f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def link(self, token: str) -> str:
        """A labeller's link. Browsers do not send the part after #, so the token reaches no log and no other site."""
        return f"{self.url}/#token={token}"

    @property
    def private(self) -> bool:
        """True if only this machine can reach the server."""
        return is_loopback(self.host) and not self.origin

    @property
    def hosts(self) -> frozenset[str] | None:
        """Accepted values of the Host header; None for any, since a machine may have names that it does not know."""
        own = {f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        if self.origin:
            return frozenset({*own, urlsplit(self.origin).netloc.lower()})
        return frozenset(own) if is_loopback(self.host) else None


def is_loopback(host: str) -> bool:
    """True for an address that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
