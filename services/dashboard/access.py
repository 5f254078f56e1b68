"""Who may open the page: anybody on this machine over loopback; elsewhere, over TLS, whoever shows a token.

What somebody with a token may do beyond looking is what its role may do at the services (manyhands/roles.py).
A page of another site that runs in the same browser is nobody: requests must name this host, and what is not a plain GET
must come from this page.
"""

from __future__ import annotations

import html
import ssl
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from manyhands.errors import NotAllowed, Refused
from manyhands.roles import LOOPBACK_IDENTITY, Identity
from manyhands.security import SecuritySettings, TokenTable, check_address, is_loopback

COOKIE = "manyhands_viewer"
LOGIN_PATH = "/login"
_COOKIE_AGE_S = 12 * 3600

_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_LOGIN_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>manyhands: sign in</title>
<link rel="stylesheet" href="/static/style.css"><body class="login"><main><h1>manyhands</h1>
<form method="post" action="/login"><label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Open the dashboard</button></form><p role="alert">{note}</p></main></body></html>"""


class Access:
    """Args:
    address: "host:port" the page listens on.

    Raises:
        Refused: Not loopback, and TLS or tokens are missing (rule 8).
    """

    def __init__(self, address: str, settings: SecuritySettings) -> None:
        check_address(address, settings)
        self._settings = settings
        self._tokens = TokenTable(settings.tokens) if settings.tokens is not None else None
        self.is_loopback = is_loopback(address)
        if not self.is_loopback and self._tokens is None:
            raise Refused(
                f"{address} is not loopback and its viewers need tokens: set security.tokens "
                "('manyhands lab-certificates' makes them), or listen on 127.0.0.1",
                field="security.tokens",
            )

    def tls(self) -> ssl.SSLContext | None:
        """Browsers have no client certificates here: the server shows its own, viewers show tokens."""
        if self._settings.certificate is None or self._settings.key is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._settings.certificate, self._settings.key)
        return context

    @property
    def middleware(self) -> Middleware:
        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            self._check_origin(request)
            if self.identity(request) is None and request.path != LOGIN_PATH and not request.path.startswith("/static/"):
                if request.path == "/":
                    raise web.HTTPSeeOther(LOGIN_PATH)
                raise web.HTTPUnauthorized(
                    text="this dashboard needs a token: Authorization: Bearer TOKEN, or sign in at /login",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            return await handler(request)

        return guard

    async def show_login(self, request: web.Request) -> web.Response:
        return _login_page("")

    async def log_in(self, request: web.Request) -> web.Response:
        token = str((await request.post()).get("token", ""))
        if self._tokens is None or self._tokens.find(token) is None:
            return _login_page("That token is not one this dashboard knows.")
        answer = web.Response(status=303, headers={"Location": "/"})
        answer.set_cookie(COOKIE, token, max_age=_COOKIE_AGE_S, httponly=True, secure=True, samesite="Strict")
        return answer

    def identity(self, request: web.Request) -> Identity | None:
        """Who asks: whoever the token says, an operator on loopback without tokens, None for a stranger."""
        if self._tokens is None:
            return LOOPBACK_IDENTITY
        return self._tokens.find(self.token(request) or "")

    def token(self, request: web.Request) -> str | None:
        """The token that is shown; None where none is asked for."""
        if self._tokens is None:
            return None
        scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
        return shown.strip() if scheme.lower() == "bearer" else request.cookies.get(COOKIE, "")

    def check_own_page(self, request: web.Request) -> None:
        """Raises NotAllowed unless a browser says that this very page sends the request; every browser says so of a POST."""
        origin = request.headers.get("Origin", "")
        if not origin or urlsplit(origin).netloc != request.host:
            raise NotAllowed("this is done from the dashboard's own page; programs call the service itself")

    def _check_origin(self, request: web.Request) -> None:
        """Refuses names that a foreign site made point here, and requests that a foreign page sends."""
        if self.is_loopback and self._tokens is None and not is_loopback(_with_port(request.host)):
            raise web.HTTPForbidden(text=f"this dashboard is at a loopback address, not at {request.host}")
        origin = request.headers.get("Origin")
        is_live = request.headers.get("Upgrade", "").lower() == "websocket"
        if (request.method != "GET" or is_live) and origin is not None and urlsplit(origin).netloc != request.host:
            raise web.HTTPForbidden(text=f"requests from pages of {origin} are refused")


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.setdefault("Content-Security-Policy", _CONTENT_SECURITY_POLICY)
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Referrer-Policy", "no-referrer")
    response.headers.setdefault("Cache-Control", "no-store")


def _with_port(host: str) -> str:
    return host if urlsplit(f"//{host}").port is not None else f"{host}:80"


def _login_page(note: str) -> web.Response:
    return web.Response(text=_LOGIN_PAGE.format(note=html.escape(note)), content_type="text/html")
