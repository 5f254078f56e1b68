"""What 'manyhands lab-certificates' leaves on disk."""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from pydantic import ValidationError

from manyhands import lab_certificates
from manyhands.errors import InvalidInput, Refused
from manyhands.lab_certificates import Settings
from manyhands.security import hash_token


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    folder = tmp_path / "lab"
    settings = Settings(output=folder, host=["gpu.lab", "192.168.1.5"], robot=["left", "right@right-pc.lab"])
    assert lab_certificates.main(settings) == 0
    return folder


def _read(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "certificate.pem").read_bytes())


def _names(folder: Path) -> set[str]:
    extension = _certificate(folder).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return {str(name.value) for name in extension.value}


def test_secrets_are_the_owners_alone(lab: Path) -> None:
    secrets = [path for path in lab.rglob("*") if path.name in ("key.pem", "authority.key", "token", "tokens.toml")]
    assert len(secrets) == 1 + 6 + 5 + 1
    for path in secrets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for folder in (path for path in lab.iterdir() if path.is_dir()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder


def test_each_certificate_has_its_identity_and_only_its_own_host_names(lab: Path) -> None:
    local = {"localhost", "127.0.0.1", "::1"}
    assert {"manyhands://viewer/server", "gpu.lab", "192.168.1.5", *local} <= _names(lab / "server")
    # A robot with the servers' names could pass for one of them.
    assert _names(lab / "robot-left") == {"manyhands://robot/left", *local}
    assert _names(lab / "robot-right") == {"manyhands://robot/right", "right-pc.lab", *local}
    assert _names(lab / "viewer-main") == {"manyhands://viewer/main"}
    purposes = _certificate(lab / "viewer-main").extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert ExtendedKeyUsageOID.SERVER_AUTH not in purposes


def test_authority_signed_them_and_they_can_sign_nothing(lab: Path) -> None:
    authority = x509.load_pem_x509_certificate((lab / "authority.pem").read_bytes())
    for folder in (path for path in lab.iterdir() if path.is_dir()):
        certificate = _certificate(folder)
        certificate.verify_directly_issued_by(authority)
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert (folder / "authority.pem").read_bytes() == (lab / "authority.pem").read_bytes()
        assert not (folder / "authority.key").exists()


def test_server_knows_tokens_by_digest_only(lab: Path) -> None:
    text = (lab / "server" / "tokens.toml").read_text()
    table = {(entry["role"], entry["name"]): entry["sha256"] for entry in tomllib.loads(text)["token"]}
    assert set(table) == {
        ("robot", "left"), ("robot", "right"), ("learner", "main"), ("operator", "main"), ("viewer", "main")
    }  # fmt: skip
    for (role, name), digest in table.items():
        token = (lab / f"{role}-{name}" / "token").read_text().strip()
        assert digest == hash_token(token)
        assert token not in text


def test_nothing_is_overwritten(lab: Path) -> None:
    before = _read(lab)
    with pytest.raises(Refused, match="nothing is overwritten"):
        lab_certificates.main(Settings(output=lab))
    with pytest.raises(Refused, match="has all of these"):
        lab_certificates.main(Settings(output=lab, add=True, robot=["left"]))
    assert _read(lab) == before


def test_a_robot_that_joins_later_is_signed_by_the_same_authority(lab: Path) -> None:
    before = _read(lab)
    lab_certificates.main(Settings(output=lab, add=True, robot=["left", "third"]))
    after = _read(lab)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"server/tokens.toml"} | {
        f"robot-third/{name}" for name in ("key.pem", "certificate.pem", "authority.pem", "token")
    }
    authority = x509.load_pem_x509_certificate((lab / "authority.pem").read_bytes())
    _certificate(lab / "robot-third").verify_directly_issued_by(authority)


def test_add_without_an_authority_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no authority"):
        lab_certificates.main(Settings(output=tmp_path, add=True))


def test_identities_do_not_outlive_what_was_asked(lab: Path, tmp_path: Path) -> None:
    lab_certificates.main(Settings(output=tmp_path / "short", days=1))
    certificate = _certificate(tmp_path / "short" / "robot-main")
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 2  # One day back for slow clocks.


@pytest.mark.parametrize("name", ["../up", "a/b", "", "x" * 65, ".hidden"])
def test_a_name_that_would_leave_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="must be letters"):
        Settings(output=tmp_path, robot=[name])


@pytest.mark.parametrize("host", ["gpu.lab:50051", "http://gpu.lab", "two words"])
def test_a_host_that_is_none_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="without port"):
        lab_certificates.main(Settings(output=tmp_path / "lab", host=[host]))


def test_says_what_to_copy_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab_certificates.main(Settings(output=tmp_path / "lab", robot=["left"]))
    text = capsys.readouterr().out
    assert f"{tmp_path / 'lab' / 'robot-left'}/" in text
    assert "--security.certificate" in text
    assert "--security.token-file" in text
