"""Who may listen where, and who is asking: TLS, tokens and roles (docs/design/0009-security.md).

Loopback may be plain and its callers are operators; any other address needs TLS and an identity with a role (rule 8).
A caller is what its bearer token says, or else what its client certificate's URI manyhands://ROLE/NAME says.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import logging
import re
import stat
import threading
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from pydantic import BaseModel, ConfigDict, Field, model_validator

from . import roles
from .errors import InvalidInput, Refused, Unauthenticated
from .interceptors import Guard, GuardInterceptor
from .roles import Identity, Role

logger = logging.getLogger(__name__)

IDENTITY_SCHEME = "manyhands"
_IDENTITY_URI = re.compile(rf"{IDENTITY_SCHEME}://(?P<role>[a-z]+)/(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{{0,63}})")
_TOKEN = re.compile(r"[\x21-\x7e]{16,512}")


class SecuritySettings(BaseModel):
    """Files that prove who we are and whom we trust; 'manyhands lab-certificates' makes a set for a lab."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate: Path | None = Field(default=None, description="PEM certificate of this process, as server and as client")
    key: Path | None = Field(default=None, description="PEM private key of that certificate")
    authority: Path | None = Field(default=None, description="PEM certificate of the lab's authority: whom to trust")
    token_file: Path | None = Field(
        default=None, description="file with the bearer token that this process shows as a client"
    )
    tokens: Path | None = Field(
        default=None, description="TOML file of the tokens that this server accepts: sha256, role and name of each"
    )
    require_client_certificate: bool = Field(
        default=True, description="servers: refuse clients without a certificate of the authority; off lets tokens do alone"
    )

    @model_validator(mode="after")
    def _belong_together(self) -> SecuritySettings:
        if (self.certificate is None) != (self.key is None):
            lacking = "key" if self.key is None else "certificate"
            raise ValueError(f"security.certificate and security.key come together; security.{lacking} is not set")
        if self.certificate is not None and self.authority is None:
            raise ValueError("security.certificate needs security.authority, which says whom to trust")
        if self.token_file is not None and self.authority is None:
            raise ValueError("security.token_file needs security.authority: a token is shown to a known server only")
        if self.tokens is not None and self.certificate is None:
            raise ValueError("security.tokens needs security.certificate: tokens travel over TLS only")
        if not self.require_client_certificate and self.tokens is None:
            raise ValueError("security.require_client_certificate off needs security.tokens, or nobody could be known")
        return self


def is_loopback(address: str) -> bool:
    """Whether "host:port" can only be reached from this machine; the unspecified addresses 0.0.0.0 and [::] can be reached
    from everywhere."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_same_machine(peer: str) -> bool:
    """As grpc names a peer. What comes through a tunnel only looks so: such a client does not find the token."""
    kind, _, rest = peer.partition(":")
    return kind == "unix" or (kind in ("ipv4", "ipv6") and is_loopback(rest.replace("%5B", "[").replace("%5D", "]")))


def check_address(address: str, settings: SecuritySettings) -> None:
    """Raises Refused for a server that would listen beyond loopback without TLS."""
    if not is_loopback(address) and settings.certificate is None:
        raise Refused(
            f"{address} is not loopback and needs TLS: set security.certificate, security.key and security.authority "
            "('manyhands lab-certificates' makes them), or listen on 127.0.0.1",
            field="address",
        )


def server_credentials(settings: SecuritySettings) -> grpc.ServerCredentials | None:
    """TLS with client certificates (unless settings turn them off), or None for a plain server."""
    if settings.certificate is None or settings.key is None or settings.authority is None:
        return None
    pair = (_read_key(settings.key), _read_pem(settings.certificate, "security.certificate"))
    authority = _read_pem(settings.authority, "security.authority")
    return grpc.ssl_server_credentials(
        [pair],
        root_certificates=authority if settings.require_client_certificate else None,
        require_client_auth=settings.require_client_certificate,
    )


def server_interceptors(settings: SecuritySettings) -> list[grpc.aio.ServerInterceptor]:
    """What finds the caller's identity and refuses calls that its role may not make; nothing on plain loopback."""
    if settings.certificate is None:
        return []
    tokens = TokenTable(settings.tokens) if settings.tokens is not None else None

    def make_guard(method: str) -> Guard:
        @contextlib.asynccontextmanager
        async def guard(context: Any) -> AsyncIterator[None]:
            identity = identify(context, method, tokens)
            roles.check_allowed(identity, method)
            roles.set_caller(identity)  # Every call has a task, and so a context, of its own.
            yield

        return guard

    return [GuardInterceptor(make_guard)]


def identify(context: Any, method: str, tokens: TokenTable | None) -> Identity:
    """Who calls: by bearer token where one is shown, else by client certificate.

    Raises:
        Unauthenticated: Neither, or one that says nothing; the message names the method and what would do.
    """
    needed = " or ".join(role.value for role in Role if role in roles.roles_for(method))
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            scheme, _, token = str(value).partition(" ")
            identity = tokens.find(token.strip()) if tokens is not None and scheme.lower() == "bearer" else None
            if identity is None:
                raise Unauthenticated(
                    f"{method}: the token shown is not one this server knows; it needs one for the role {needed}"
                )
            return identity
    for value in context.auth_context().get("peer_uri", ()):
        match = _IDENTITY_URI.fullmatch(value.decode("utf-8", "replace"))
        if match and match["role"] in {role.value for role in Role}:
            return Identity(role=Role(match["role"]), name=match["name"])
    raise Unauthenticated(
        f"{method} needs an identity with the role {needed}: a client certificate with the URI "
        f"{IDENTITY_SCHEME}://ROLE/NAME or a bearer token (security.certificate or security.token_file of the client)"
    )


class TokenTable:
    """Tokens a server accepts, read again when the file changes, so that a token taken out of it ends at once.

    The file has one table a token, and the token itself is in no server's file:

        [[token]]
        role = "viewer"
        name = "dashboard"
        sha256 = "64 hexadecimal digits"
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._state: tuple[int, int] | None = None
        self._identities: dict[str, Identity] = {}
        self._refresh()

    def find(self, token: str) -> Identity | None:
        """The identity of token. A file that cannot be read any more refuses every token."""
        if not _TOKEN.fullmatch(token):
            return None
        with self._lock:
            try:
                self._refresh()
            except InvalidInput as error:
                logger.error("no token is accepted: %s", error)
                return None
            # The table's keys are digests: how long a look-up takes says nothing about a token.
            return self._identities.get(hash_token(token))

    def _refresh(self) -> None:
        try:
            status = self._path.stat()
            state = (status.st_mtime_ns, status.st_size)
            if state != self._state:
                self._identities = _parse_tokens(self._path.read_text(encoding="utf-8"), self._path)
                self._state = state
        except OSError as error:
            self._state = None
            raise InvalidInput(f"cannot read {self._path}: {error}", field="security.tokens") from None


def hash_token(token: str) -> str:
    """Tokens are long and random, so one round of sha256 keeps them."""
    return hashlib.sha256(token.encode()).hexdigest()


def _parse_tokens(text: str, path: Path) -> dict[str, Identity]:
    try:
        entries = tomllib.loads(text).get("token", [])
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{path} is not TOML: {error}", field="security.tokens") from None
    identities: dict[str, Identity] = {}
    for number, entry in enumerate(entries, start=1):
        digest, role, name = (str(entry.get(key, "")) for key in ("sha256", "role", "name"))
        if not re.fullmatch("[0-9a-f]{64}", digest) or not _IDENTITY_URI.fullmatch(f"{IDENTITY_SCHEME}://{role}/{name}"):
            raise InvalidInput(
                f"{path}: token {number} needs sha256 (64 hexadecimal digits), role and name", field="security.tokens"
            )
        if role not in {known.value for known in Role}:
            known_roles = ", ".join(known.value for known in Role)
            raise InvalidInput(f"{path}: token {number} has role {role!r}; roles are {known_roles}", field="security.tokens")
        identities[digest] = Identity(role=Role(role), name=name)
    return identities


def channel_credentials(address: str, settings: SecuritySettings) -> grpc.ChannelCredentials | None:
    """TLS wherever an authority is configured, with certificate and token as far as given; None for plain loopback.

    Raises:
        Refused: The address is not loopback and no authority says whom to trust.
        InvalidInput: A file cannot be read.
    """
    if settings.authority is None:
        if not is_loopback(address):
            raise Refused(
                f"{address} is not loopback and needs TLS: set security.authority, and security.certificate with "
                "security.key, or security.token_file",
                field="address",
            )
        return None
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read_pem(settings.authority, "security.authority"),
        private_key=_read_key(settings.key) if settings.key else None,
        certificate_chain=_read_pem(settings.certificate, "security.certificate") if settings.certificate else None,
    )
    if settings.token_file is None:
        return credentials
    token = _read(settings.token_file, "security.token_file").decode("utf-8", "replace").strip()
    if not _TOKEN.fullmatch(token):
        raise InvalidInput(
            f"{settings.token_file} does not hold a token: 16 to 512 printable characters in one line",
            field="security.token_file",
        )
    return grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(token))


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}", field=field) from None


def _read_pem(path: Path, field: str) -> bytes:
    content = _read(path, field)
    if b"-----BEGIN CERTIFICATE-----" not in content:
        raise InvalidInput(f"{path} holds no PEM certificate", field=field)
    return content


def _read_key(path: Path) -> bytes:
    content = _read(path, "security.key")
    if b"PRIVATE KEY-----" not in content:
        raise InvalidInput(f"{path} holds no PEM private key", field="security.key")
    if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning("others on this machine can read the private key %s: run  chmod 600 on it", path)
    return content
