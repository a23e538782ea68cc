"""The guards of the endpoint: against DNS rebinding by the Host header, and by a bearer token."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from http import HTTPStatus

from pidpool.export.endpoint.answers import Answer, Request

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

_PORT = re.compile(r":[0-9]*\Z")
# The characters of a bearer token, after RFC 6750.
_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")


class HostGuard:
    """Refuses requests for a host name that is not allowed.

    A web site can have its own name resolve to 127.0.0.1, and its scripts then count as of the same
    origin as this endpoint (DNS rebinding). But such a request always has the site's own name in
    its Host header.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        if isinstance(allowed, str):
            raise TypeError(f"allowed_hosts={allowed!r}: takes a list of names, as [{allowed!r}]")
        self._allowed = {*LOOPBACK, *map(_name, allowed)}

    def refusal(self, request: Request) -> Answer | None:
        """Return why the request is refused, or None."""
        if "*" in self._allowed or (request.host and _name(request.host) in self._allowed):
            return None
        allowed = ", ".join(sorted(self._allowed))
        return Answer.text(
            HTTPStatus.FORBIDDEN,
            f"The request's Host header is not one of this endpoint's ({allowed}); allow others "
            "with allowed_hosts=['their.names', ...], or ['*'] for all.",
        )


class TokenGuard:
    """Refuses requests without the bearer token, if one is set."""

    def __init__(self, token: str | None) -> None:
        if token is not None and not (isinstance(token, str) and _TOKEN.fullmatch(token)):
            # Without the value: even a malformed token is a secret.
            raise ValueError(
                "token=...: takes letters, digits and -._~+/ (one or more), or None for no token; "
                "secrets.token_urlsafe() makes a good one"
            )
        self._token = None if token is None else token.encode()

    def refusal(self, request: Request) -> Answer | None:
        """Return why the request is refused, or None."""
        if self._token is None:
            return None
        scheme, _, given = request.authorization.partition(" ")
        # Compared in constant time, so that it can't be guessed one letter at a time.
        fits = hmac.compare_digest(given.strip().encode(errors="replace"), self._token)
        if fits and scheme.lower() == "bearer":
            return None
        fact = "The bearer token is wrong" if given else "This endpoint requires a bearer token"
        return Answer.text(
            HTTPStatus.UNAUTHORIZED,
            f"{fact}; send the header 'Authorization: Bearer <token>' with the token given to the endpoint.",
            WWW_Authenticate='Bearer realm="pidpool"',
        )


def _name(host: str) -> str:
    """Return a host's name without its port."""
    return _PORT.sub("", host.strip()).lower().rstrip(".")
