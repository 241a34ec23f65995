"""Guard of the page: host, origin, cookie and size of every request, and the headers of every answer."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlencode

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 1 << 20
"""Bytes of a request that is no upload: a form has a few kilobytes."""
LARGEST_UPLOAD = 256 << 20
"""Bytes of an uploaded data file; a larger one is named by its path."""
UPLOAD = "/api/upload"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every answer that does not set its own."""
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Access:
    """Who may ask: the token of the printed URL, the cookie that it is exchanged for, and the names of this machine."""

    token: str
    port: int
    host: str = "127.0.0.1"
    names: tuple[str, ...] = ()
    """Names of this machine besides `host`, where it listens on more than the loopback."""
    cookie: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    @property
    def cookie_name(self) -> str:
        """By port: cookies of one host name are shared by all its ports."""
        return f"runner_ui_{self.port}"

    def knows_host(self, host: str) -> bool:
        """The `Host` of a request is this machine's: another name may be a page's that has been pointed here (DNS
        rebinding). An address is none of a page's, so any will do where the page is open to the network."""
        name = host.rsplit(":", 1)[0] if not host.endswith("]") and ":" in host else host
        name = name.strip("[]").lower()
        if name in (*LOCAL_NAMES, self.host.lower(), *(one.lower() for one in self.names)):
            return True
        return self.host not in LOCAL_NAMES and _is_address(name)

    def let_in(self, cookie: str | None) -> bool:
        """The cookie is ours."""
        return cookie is not None and hmac.compare_digest(cookie.encode(), self.cookie.encode())

    def is_token(self, token: str) -> bool:
        """The token is that of the printed URL."""
        return hmac.compare_digest(token.encode(), self.token.encode())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class TooLargeError(Exception):
    """A body without a stated length went over the limit."""


class Guard:
    """ASGI middleware around the page's application."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        request = Request(scope)
        answer = self._refusal(request) or self._entrance(request)
        if answer is not None:
            await answer(scope, receive, _with_headers(send))
            return
        body = _Body(receive, _limit(request))
        await self.app(scope, body.receive, _with_headers(send, body))

    def _refusal(self, request: Request) -> Response | None:
        """What is refused whoever asks."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not self.access.knows_host(host):
            return PlainTextResponse(f"This page is not served as {host[:200]!r}.", 421)
        changes = request.method not in ("GET", "HEAD")
        if (origin is None and changes) or (origin is not None and origin not in (f"http://{host}", f"https://{host}")):
            return PlainTextResponse("Requests come from the page itself only.", 403)
        site = request.headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and request.url.path != "/":
            return PlainTextResponse("Requests come from the page itself only.", 403)
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > _limit(request):
            return _too_large(_limit(request))
        return None

    def _entrance(self, request: Request) -> Response | None:
        """Exchange the token for a cookie; without either nothing is answered."""
        if request.url.path == "/" and (given := parse_qs(request.url.query).get("token")):
            if not self.access.is_token(given[0]):
                return _locked()
            rest = {name: value for name, value in request.query_params.items() if name != "token"}
            answer = RedirectResponse(f"/?{urlencode(rest)}" if rest else "/", 303)
            answer.set_cookie(self.access.cookie_name, self.access.cookie, httponly=True, samesite="strict", path="/")
            return answer
        return None if self.access.let_in(request.cookies.get(self.access.cookie_name)) else _locked()


def _locked() -> Response:
    return PlainTextResponse("Open the address that `python -m runner ui` has printed: it holds the token.", 401)


def _limit(request: Request) -> int:
    return LARGEST_UPLOAD if request.url.path == UPLOAD else LARGEST_BODY


def _too_large(limit: int) -> Response:
    what = f"The request is larger than {limit >> 20} MiB; name a larger file by its path (data.path)."
    return PlainTextResponse(what, 413, headers={"connection": "close"})


class _Body:
    """A body up to a limit, whatever its length was said to be."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._left = receive, limit

    @property
    def too_large(self) -> bool:
        """More came than the limit allows: what the application makes of the rest is answered as 413."""
        return self._left < 0

    async def receive(self) -> Message:
        """The next part; TooLargeError after the limit."""
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self.too_large:
            raise TooLargeError
        return message


def _with_headers(send: Send, body: _Body | None = None) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message["headers"]}
            added = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in given]
            status = 413 if body is not None and body.too_large else message["status"]
            message = {**message, "status": status, "headers": [*message["headers"], *added]}
        await send(message)

    return sending
