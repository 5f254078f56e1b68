"""Who gets in, over real TLS sockets with certificates of a lab made for the test."""

from __future__ import annotations

import datetime
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import ValidationError

from manyhands import channel, lab_certificates, roles, security
from manyhands.errors import InvalidInput, ManyhandsError, NotAllowed, Refused, Unauthenticated, Unreachable
from manyhands.roles import Identity, Role
from manyhands.security import SecuritySettings
from manyhands.server import GrpcServer
from manyhands.weights.v1 import weights_pb2, weights_pb2_grpc

FIND_MISSING = "/manyhands.weights.v1.WeightsService/FindMissing"
HOUR = datetime.timedelta(hours=1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "lab"
    lab_certificates.main(lab_certificates.Settings(output=folder))
    return folder


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another lab: valid in itself, unknown to the first."""
    folder = tmp_path_factory.mktemp("strangers") / "lab"
    lab_certificates.main(lab_certificates.Settings(output=folder))
    return folder


def _pair(folder: Path, *, authority: Path | None = None, **more: object) -> SecuritySettings:
    return SecuritySettings(
        certificate=folder / "certificate.pem",
        key=folder / "key.pem",
        authority=authority or folder / "authority.pem",
        **more,  # type: ignore[arg-type]
    )


def _token(lab: Path, name: str) -> SecuritySettings:
    return SecuritySettings(authority=lab / "authority.pem", token_file=lab / name / "token")


class Weights(weights_pb2_grpc.WeightsServiceServicer):
    """Remembers who called."""

    callers: list[Identity]

    def __init__(self) -> None:
        self.callers = []

    async def FindMissing(self, request: object, context: object) -> weights_pb2.FindMissingResponse:  # noqa: N802
        self.callers.append(roles.caller())
        return weights_pb2.FindMissingResponse()

    async def Watch(self, request: object, context: object) -> AsyncIterator[weights_pb2.WatchResponse]:  # noqa: N802
        self.callers.append(roles.caller())
        yield weights_pb2.WatchResponse()


@asynccontextmanager
async def _serving(settings: SecuritySettings | None) -> AsyncIterator[tuple[str, Weights]]:
    server, servicer = GrpcServer("127.0.0.1:0", security_settings=settings), Weights()
    server.add(weights_pb2_grpc.add_WeightsServiceServicer_to_server, servicer, "manyhands.weights.v1.WeightsService")
    await server.start()
    try:
        yield server.address, servicer
    finally:
        await server.stop(0)


async def _find_missing(address: str, settings: SecuritySettings | None) -> None:
    async with channel.connect_aio(address, security_settings=settings) as link:
        with channel.translated_errors():
            await weights_pb2_grpc.WeightsServiceStub(link).FindMissing(weights_pb2.FindMissingRequest(), timeout=5)


async def _refusal(address: str, settings: SecuritySettings | None) -> ManyhandsError:
    with pytest.raises(ManyhandsError) as caught:
        await _find_missing(address, settings)
    return caught.value


async def test_certificate_of_the_right_role_gets_in_and_is_known_by_name(lab: Path) -> None:
    async with _serving(_pair(lab / "server")) as (address, servicer):
        await _find_missing(address, _pair(lab / "learner-main"))
        await _find_missing(address, _pair(lab / "operator-main"))
    assert servicer.callers == [Identity(role=Role.LEARNER, name="main"), Identity(role=Role.OPERATOR, name="main")]


@pytest.mark.parametrize("who", ["robot-main", "viewer-main", "server"])
async def test_wrong_role_hears_method_and_role_needed(who: str, lab: Path) -> None:
    async with _serving(_pair(lab / "server")) as (address, servicer):
        refusal = await _refusal(address, _pair(lab / who))
    assert type(refusal) is NotAllowed
    assert FIND_MISSING in refusal.message
    assert "learner or operator" in refusal.message
    assert servicer.callers == []


async def test_every_role_may_look_and_ask_for_health(lab: Path) -> None:
    async with _serving(_pair(lab / "server")) as (address, servicer):
        for who in ("robot-main", "learner-main", "operator-main", "viewer-main"):
            async with channel.connect_aio(address, security_settings=_pair(lab / who)) as link:
                answer = await health_pb2_grpc.HealthStub(link).Check(health_pb2.HealthCheckRequest(), timeout=5)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                async for _ in weights_pb2_grpc.WeightsServiceStub(link).Watch(weights_pb2.WatchRequest(), timeout=5):
                    pass
    assert [caller.role for caller in servicer.callers] == [Role.ROBOT, Role.LEARNER, Role.OPERATOR, Role.VIEWER]


async def test_client_without_certificate_does_not_even_connect(lab: Path) -> None:
    async with _serving(_pair(lab / "server")) as (address, servicer):
        for settings in (SecuritySettings(authority=lab / "authority.pem"), _token(lab, "learner-main")):
            assert type(await _refusal(address, settings)) is Unreachable
    assert servicer.callers == []


async def test_plain_client_and_tls_server_do_not_meet(lab: Path) -> None:
    async with _serving(_pair(lab / "server")) as (address, servicer):
        assert type(await _refusal(address, None)) is Unreachable
    async with _serving(None) as (address, plain_servicer):
        assert type(await _refusal(address, _pair(lab / "learner-main"))) is Unreachable
    assert servicer.callers == plain_servicer.callers == []


async def test_strangers_do_not_get_in_and_are_not_believed(lab: Path, strangers: Path) -> None:
    async with _serving(_pair(lab / "server")) as (address, servicer):
        theirs = _pair(strangers / "operator-main", authority=lab / "authority.pem")
        assert type(await _refusal(address, theirs)) is Unreachable
    assert servicer.callers == []
    async with _serving(_pair(strangers / "server", authority=lab / "authority.pem")) as (address, impostor):
        assert type(await _refusal(address, _pair(lab / "learner-main"))) is Unreachable
    assert impostor.callers == []


@pytest.mark.parametrize("who", ["viewer-main", "learner-main"])
async def test_a_clients_certificate_cannot_play_the_server(who: str, lab: Path) -> None:
    async with _serving(_pair(lab / who)) as (address, impostor):
        assert type(await _refusal(address, _pair(lab / "learner-main"))) is Unreachable
    assert impostor.callers == []


def _issue(lab: Path, folder: Path, *, not_before: datetime.timedelta, not_after: datetime.timedelta) -> SecuritySettings:
    now = datetime.datetime.now(datetime.UTC)
    certificate, key = lab_certificates.issue(
        lab_certificates.load_authority(lab),
        Identity(role=Role.LEARNER, name="late"),
        server_names=(),
        not_before=now + not_before,
        not_after=now + not_after,
    )
    pem = serialization.Encoding.PEM
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(pem))
    key_path = folder / "key.pem"
    key_path.touch(mode=0o600)
    key_path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return _pair(folder, authority=lab / "authority.pem")


async def test_expired_certificate_and_one_of_the_future_do_not_get_in(lab: Path, tmp_path: Path) -> None:
    async with _serving(_pair(lab / "server")) as (address, servicer):
        await _find_missing(address, _issue(lab, tmp_path, not_before=-HOUR, not_after=HOUR))
        for not_before, not_after in ((-2 * HOUR, -HOUR), (HOUR, 2 * HOUR)):
            settings = _issue(lab, tmp_path, not_before=not_before, not_after=not_after)
            assert type(await _refusal(address, settings)) is Unreachable
    assert [str(caller) for caller in servicer.callers] == ["learner/late"]


@pytest.fixture
def token_server(lab: Path, tmp_path: Path) -> SecuritySettings:
    """A server that lets tokens do alone, with a table of its own to change."""
    tokens = tmp_path / "tokens.toml"
    tokens.write_bytes((lab / "server" / "tokens.toml").read_bytes())
    return _pair(lab / "server", tokens=tokens, require_client_certificate=False)


async def test_token_says_role_and_name(lab: Path, token_server: SecuritySettings) -> None:
    async with _serving(token_server) as (address, servicer):
        await _find_missing(address, _token(lab, "learner-main"))
        refusal = await _refusal(address, _token(lab, "viewer-main"))
    assert servicer.callers == [Identity(role=Role.LEARNER, name="main")]
    assert type(refusal) is NotAllowed
    assert "viewer/main" in refusal.message


async def test_wrong_token_and_none_hear_method_and_role_needed(
    lab: Path, strangers: Path, token_server: SecuritySettings
) -> None:
    nobody = SecuritySettings(authority=lab / "authority.pem")
    stranger = SecuritySettings(authority=lab / "authority.pem", token_file=strangers / "learner-main" / "token")
    async with _serving(token_server) as (address, servicer):
        for settings in (nobody, stranger):
            refusal = await _refusal(address, settings)
            assert type(refusal) is Unauthenticated
            assert FIND_MISSING in refusal.message
            assert "learner or operator" in refusal.message
    assert servicer.callers == []


async def test_token_taken_out_of_the_table_ends_at_once(lab: Path, token_server: SecuritySettings) -> None:
    assert token_server.tokens is not None
    async with _serving(token_server) as (address, _):
        await _find_missing(address, _token(lab, "learner-main"))
        token_server.tokens.write_text("# empty\n")
        assert type(await _refusal(address, _token(lab, "learner-main"))) is Unauthenticated


async def test_table_that_became_unreadable_lets_nobody_in(
    lab: Path, token_server: SecuritySettings, caplog: pytest.LogCaptureFixture
) -> None:
    assert token_server.tokens is not None
    async with _serving(token_server) as (address, _):
        for damage in ("[[token", "[[token]]\nrole='king'\nname='x'\nsha256='" + "0" * 64 + "'"):
            token_server.tokens.write_text(damage)
            assert type(await _refusal(address, _token(lab, "operator-main"))) is Unauthenticated
    assert "no token is accepted" in caplog.text


async def test_token_beside_a_certificate_must_be_good(lab: Path, strangers: Path) -> None:
    """A certificate does not make up for a false token: who shows one wants to be somebody else."""
    server = _pair(lab / "server", tokens=lab / "server" / "tokens.toml")
    async with _serving(server) as (address, servicer):
        await _find_missing(address, _pair(lab / "viewer-main", token_file=lab / "learner-main" / "token"))
        false = _pair(lab / "learner-main", token_file=strangers / "learner-main" / "token")
        assert type(await _refusal(address, false)) is Unauthenticated
    assert [str(caller) for caller in servicer.callers] == ["learner/main"]


async def test_on_plain_loopback_everyone_is_the_operator() -> None:
    async with _serving(None) as (address, servicer):
        await _find_missing(address, None)
    assert servicer.callers == [roles.LOOPBACK_IDENTITY]
    assert roles.LOOPBACK_IDENTITY.role is Role.OPERATOR


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:50051", "[::]:50051", ":50051", "192.168.1.5:50051", "gpu.lab:50051", "[fe80::1]:50051",
     "localhost.evil.com:1", "[::ffff:192.168.1.5]:1", "127.0.0.1.evil.com:1", "0:50051", "*:50051"],
)  # fmt: skip
async def test_beyond_loopback_nothing_is_plain(address: str) -> None:
    with pytest.raises(Refused, match="not loopback and needs TLS"):
        GrpcServer(address)
    with pytest.raises(Refused, match="not loopback and needs TLS"):
        channel.connect(address)
    with pytest.raises(Refused, match="not loopback and needs TLS"):
        channel.connect_aio(address)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.8.8.8:1", "localhost:1", "[::1]:1", "unix:/tmp/socket"])
def test_loopback_may_be_plain(address: str) -> None:
    assert security.is_loopback(address)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"certificate": "c"}, "security.key is not set"),
        ({"key": "k"}, "security.certificate is not set"),
        ({"certificate": "c", "key": "k"}, "needs security.authority"),
        ({"token_file": "t"}, "needs security.authority"),
        ({"authority": "a", "tokens": "t"}, "needs security.certificate"),
        ({"certificate": "c", "key": "k", "authority": "a", "require_client_certificate": False}, "needs security.tokens"),
    ],
)
def test_settings_that_would_leave_a_door_open_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SecuritySettings.model_validate(fields)


async def test_files_that_hold_something_else_are_named(lab: Path, tmp_path: Path) -> None:
    missing = _pair(tmp_path)
    with pytest.raises(InvalidInput, match=r"security.key: cannot read .*key.pem"):
        GrpcServer("127.0.0.1:0", security_settings=missing)
    swapped = SecuritySettings(
        certificate=lab / "server" / "key.pem", key=lab / "server" / "certificate.pem", authority=lab / "authority.pem"
    )
    with pytest.raises(InvalidInput, match=r"security.key: .* holds no PEM private key"):
        GrpcServer("127.0.0.1:0", security_settings=swapped)
    (tmp_path / "token").write_text("two words\n")
    with pytest.raises(InvalidInput, match=r"security.token_file"):
        channel.connect("127.0.0.1:1", security_settings=SecuritySettings(
            authority=lab / "authority.pem", token_file=tmp_path / "token"
        ))  # fmt: skip


def test_key_that_others_can_read_is_warned_of(lab: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("certificate.pem", "key.pem", "authority.pem"):
        (tmp_path / name).write_bytes((lab / "server" / name).read_bytes())
    (tmp_path / "key.pem").chmod(0o644)
    with caplog.at_level(logging.WARNING):
        security.server_credentials(_pair(tmp_path))
    assert "chmod 600" in caplog.text
