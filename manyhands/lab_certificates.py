"""Certificates and tokens for a lab: an authority of its own, a server, and an identity for each role.

Makes one folder an identity, each complete: copy the folder to the machine that needs it, and nothing else. The authority's
key signs new identities (--add) and belongs on no robot and no server.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import Field, field_validator

from . import config
from .errors import InvalidInput, Refused
from .roles import Identity, Role
from .security import IDENTITY_SCHEME, hash_token

AUTHORITY_DAYS = 3650
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# A robot PC without a battery clock may start in the past; a certificate must not fail there for being new.
_CLOCK_SLACK = datetime.timedelta(days=1)
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class Settings(config.Settings):
    examples = (
        "--output lab --host gpu.lab --host 192.168.1.5 --robot left --robot right@right-pc.lab",
        "--output lab --add --robot third",
    )

    output: Path = Field(description="folder to make; nothing in it is ever overwritten")
    host: list[str] = Field(default=[], description="name or IP address under which clients reach the servers")
    robot: list[str] = Field(
        default=["main"],
        description="name of a robot: an identity each; NAME@HOST where its agent is reached from other machines",
    )
    learner: list[str] = Field(default=["main"], description="name of a learner: an identity each")
    operator: list[str] = Field(default=["main"], description="name of a person or tool who runs the fleet")
    viewer: list[str] = Field(default=["main"], description="name of a person or tool who only looks")
    days: int = Field(default=365, ge=1, le=3650, description="how long the identities are valid")
    add: bool = Field(default=False, description="add the identities that are missing, signed by the authority in output")

    @field_validator("robot", "learner", "operator", "viewer")
    @classmethod
    def _names(cls, names: list[str]) -> list[str]:
        for name in names:
            if not _NAME.fullmatch(name.partition("@")[0]):
                raise ValueError(f"name {name!r} must be letters, digits, '.', '_' and '-', at most 64")
        return names


@dataclass(frozen=True, kw_only=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def main(settings: Settings) -> int:
    output = settings.output
    if settings.add:
        authority = load_authority(output)
    else:
        if output.exists() and any(output.iterdir()):
            raise Refused(
                f"{output} is not empty, and nothing is overwritten; choose another folder, or --add identities to it",
                field="output",
            )
        output.mkdir(parents=True, exist_ok=True, mode=0o700)
        authority = make_authority()
        _write(output / "authority.key", _key_pem(authority.key), secret=True)
        _write(output / "authority.pem", _certificate_pem(authority.certificate))
    lifetime = datetime.timedelta(days=settings.days)
    made: list[str] = []
    if not (output / "server").exists():
        _make_server(output, authority, settings.host, lifetime)
        made.append("server")
    for identity, host in _identities(settings):
        folder = output / f"{identity.role.value}-{identity.name}"
        if not folder.exists():
            _make_identity(output, folder, authority, identity, host, lifetime)
            made.append(folder.name)
    if not made:
        raise Refused(f"{output} has all of these identities already; name new ones", field="add")
    print(_what_to_do(output, made, settings.days))
    return 0


def make_authority() -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"manyhands lab authority {secrets.token_hex(4)}")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SLACK)
        .not_valid_after(now + datetime.timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate=certificate, key=key)


def load_authority(folder: Path) -> Authority:
    """The authority that make_authority's files hold; InvalidInput says which one cannot be read."""
    try:
        certificate = x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
        key = serialization.load_pem_private_key((folder / "authority.key").read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{folder} holds no authority to add to: {error}", field="output") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidInput(f"{folder / 'authority.key'} is not a key that this command made", field="output")
    return Authority(certificate=certificate, key=key)


def issue(
    authority: Authority,
    identity: Identity,
    *,
    server_names: Sequence[str],
    not_after: datetime.datetime,
    not_before: datetime.datetime | None = None,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A client certificate with the URI of identity, which also serves under server_names (DNS names or IP addresses)."""
    key = ec.generate_private_key(ec.SECP256R1())
    uri = x509.UniformResourceIdentifier(f"{IDENTITY_SCHEME}://{identity.role.value}/{identity.name}")
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if server_names else [])]
    issuer_key_id = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(identity)[:64])]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before or datetime.datetime.now(datetime.UTC) - _CLOCK_SLACK)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectAlternativeName([uri, *(_general_name(name) for name in server_names)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key_id), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return certificate, key


def _identities(settings: Settings) -> list[tuple[Identity, str]]:
    """Each identity with the host its server is reached under, "" for none."""
    names = {
        Role.ROBOT: settings.robot,
        Role.LEARNER: settings.learner,
        Role.OPERATOR: settings.operator,
        Role.VIEWER: settings.viewer,
    }
    pairs: list[tuple[Identity, str]] = []
    for role, members in names.items():
        for member in dict.fromkeys(members):
            name, _, host = member.partition("@")
            pairs.append((Identity(role=role, name=name), host))
    return pairs


def _make_server(output: Path, authority: Authority, hosts: Sequence[str], lifetime: datetime.timedelta) -> None:
    names = list(dict.fromkeys([*hosts, socket.gethostname(), *_LOCAL_NAMES]))
    # Services look at each other (a policy server watches the weights) and are viewers then.
    server = Identity(role=Role.VIEWER, name="server")
    _write_pair(output / "server", authority, server, names, lifetime)
    _write(output / "server" / "tokens.toml", b"# Tokens this server accepts; take one out to end it.\n", secret=True)


def _make_identity(
    output: Path,
    folder: Path,
    authority: Authority,
    identity: Identity,
    host: str,
    lifetime: datetime.timedelta,
) -> None:
    # The agent on a robot PC listens with the robot's certificate, under its own name: never under the servers', whom it
    # could play then.
    names = [*([host] if host else []), *_LOCAL_NAMES] if identity.role is Role.ROBOT else []
    _write_pair(folder, authority, identity, names, lifetime)
    token = secrets.token_urlsafe(32)
    _write(folder / "token", token.encode() + b"\n", secret=True)
    entry = f'\n[[token]]\nrole = "{identity.role.value}"\nname = "{identity.name}"\nsha256 = "{hash_token(token)}"\n'
    with (output / "server" / "tokens.toml").open("a", encoding="utf-8") as table:
        table.write(entry)


def _write_pair(
    folder: Path, authority: Authority, identity: Identity, names: Sequence[str], lifetime: datetime.timedelta
) -> None:
    not_after = min(datetime.datetime.now(datetime.UTC) + lifetime, authority.certificate.not_valid_after_utc)
    certificate, key = issue(authority, identity, server_names=names, not_after=not_after)
    folder.mkdir(mode=0o700)
    _write(folder / "key.pem", _key_pem(key), secret=True)
    _write(folder / "certificate.pem", _certificate_pem(certificate))
    _write(folder / "authority.pem", _certificate_pem(authority.certificate))


def _write(path: Path, content: bytes, *, secret: bool = False) -> None:
    # The mode is set as the file is made: a key that is readable for a moment has been readable.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not re.fullmatch(r"[A-Za-z0-9*]([A-Za-z0-9._-]*[A-Za-z0-9])?", host):
        raise InvalidInput(f"{host!r} is neither a host name nor an IP address; give it without port", field="host")
    return x509.DNSName(host)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _what_to_do(output: Path, made: Sequence[str], days: int) -> str:
    copies = []
    for name in made:
        where = "every machine that runs serve, weights, store, learner or dashboard as a server"
        if name.startswith("robot-"):
            where = "that robot's PC, for manyhands robot and manyhands actor"
        elif name != "server":
            where = f"the machine of that {name.partition('-')[0]}"
        copies.append(f"  {output / name}/  to {where}")
    return "\n".join(
        [
            f"made in {output}, valid for {days} days:",
            *copies,
            "",
            "on each machine, with FOLDER as the copied folder:",
            "  --security.certificate FOLDER/certificate.pem --security.key FOLDER/key.pem "
            "--security.authority FOLDER/authority.pem",
            "servers that also take tokens add:",
            "  --security.tokens FOLDER/tokens.toml",
            "a client without a certificate shows its token instead (the servers with "
            "--security.no-require-client-certificate):",
            "  --security.authority FOLDER/authority.pem --security.token-file FOLDER/token",
            "",
            f"keep {output / 'authority.key'} off the network: who has it can be anyone.",
            "after --add, copy server/tokens.toml again.",
        ]
    )
