"""Who is let in by `manyhands serve` with certificates: the real command, over TLS, with a lab's own authority."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization

from deploy.local import Topology
from manyhands import lab_certificates
from manyhands.clients.act_stream import Chunk
from manyhands.clients.inference import InferenceClient
from manyhands.clients.weights import WeightsClient
from manyhands.errors import NotAllowed, Refused, Unreachable
from manyhands.inference.v1 import inference_pb2
from manyhands.roles import Identity, Role
from manyhands.security import SecuritySettings
from services.inference.weights_bringer import WeightsBringer
from tests.support import fault_lab
from tests.support.fault_lab import Lab, picture_and_state, secured
from tests.support.inference_lab import ENVIRONMENT, next_reply

HOUR = datetime.timedelta(hours=1)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("lab") / "lab"
    lab_certificates.main(lab_certificates.Settings(output=folder))
    return folder


@pytest.fixture(scope="module")
def lab(certificates: Path, checkpoints: Path) -> Iterator[Lab]:
    server = certificates / "server"
    flags = [
        f"--security.{name}={server / file}"
        for name, file in (("certificate", "certificate.pem"), ("key", "key.pem"), ("authority", "authority.pem"))
    ]
    with Topology(certificates / "logs", environment=ENVIRONMENT) as topology:
        yield fault_lab.serve(topology, checkpoints, "plain", *flags)


def issued(
    folder: Path, certificates: Path, role: Role, not_before: datetime.timedelta, not_after: datetime.timedelta
) -> SecuritySettings:
    """An identity of the lab's own authority with that lifetime, counted from now."""
    now = datetime.datetime.now(datetime.UTC)
    certificate, key = lab_certificates.issue(
        lab_certificates.load_authority(certificates),
        Identity(role=role, name="late"),
        server_names=(),
        not_before=now + not_before,
        not_after=now + not_after,
    )
    pem = serialization.Encoding.PEM
    folder.mkdir()
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(pem))
    key_path = folder / "key.pem"
    key_path.touch(mode=0o600)
    key_path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return secured(folder, certificates / "authority.pem")


def test_expired_future_foreign_and_no_certificates_do_not_get_in_and_a_robot_is_served_meanwhile(
    lab: Lab, certificates: Path, tmp_path: Path
) -> None:
    lab_certificates.main(lab_certificates.Settings(output=tmp_path / "strangers"))
    ours = certificates / "authority.pem"
    outsiders = {
        "expired": issued(tmp_path / "expired", certificates, Role.ROBOT, -2 * HOUR, -HOUR),
        "future": issued(tmp_path / "future", certificates, Role.ROBOT, HOUR, 2 * HOUR),
        "foreign": secured(tmp_path / "strangers" / "robot-main", ours),
        "without": SecuritySettings(authority=ours),
    }
    valid = issued(tmp_path / "valid", certificates, Role.ROBOT, -HOUR, HOUR)
    with (
        InferenceClient(lab.address, security_settings=valid) as robot,
        robot.act_stream(lab.open_session(robot, "left").session_id) as stream,
    ):
        for seed, (name, settings) in enumerate(outsiders.items()):
            with InferenceClient(lab.address, security_settings=settings) as client:
                with pytest.raises(Unreachable):
                    lab.open_session(client, name)
                with pytest.raises(Unreachable):
                    client.status()
            lab.ask(stream, seed)
            result = next_reply(stream).result
            assert isinstance(result, Chunk)
            lab.check_chunk(result.actions, seed)
        with InferenceClient(lab.address) as plain, pytest.raises(Unreachable):
            plain.status()
        assert [session.robot_id for session in robot.status().sessions] == ["left"]


def test_each_role_may_do_its_own_and_hears_which_it_lacks(lab: Lab, certificates: Path) -> None:
    with (
        InferenceClient(lab.address, security_settings=secured(certificates / "robot-main")) as robot,
        InferenceClient(lab.address, security_settings=secured(certificates / "viewer-main")) as viewer,
        InferenceClient(lab.address, security_settings=secured(certificates / "learner-main")) as learner,
        InferenceClient(lab.address, security_settings=secured(certificates / "operator-main")) as operator,
    ):
        session = lab.open_session(robot, "owned")
        for client, who in ((viewer, "viewer/main"), (learner, "learner/main")):
            # Looking is for everyone; what costs the GPU or moves a robot is not, also with a robot's own session.
            assert client.status().sessions
            with pytest.raises(NotAllowed, match=f"robot or operator; {who}"):
                lab.open_session(client, "mine")
            with pytest.raises(NotAllowed, match=who):
                client.close_session(session.session_id)
            with pytest.raises(NotAllowed, match=who):
                list(
                    client.generate(
                        session.session_id,
                        kind=inference_pb2.TEXT_KIND_SUBTASK,
                        observation=picture_and_state(1),
                        task="tidy up",
                    )
                )
            with client.act_stream(session.session_id) as stream, pytest.raises(NotAllowed, match=who):
                next_reply(stream)
        for client in (viewer, learner, robot):
            with pytest.raises(NotAllowed, match="the role operator"):
                client.swap_weights(lab.model)
        with pytest.raises(Refused, match="no weights service"):  # Allowed, though there is nothing to swap to.
            operator.swap_weights(lab.model)
        with robot.act_stream(session.session_id) as stream:
            lab.ask(stream, 1)
            assert isinstance(next_reply(stream).result, Chunk)


def test_versions_come_in_from_a_weights_service_that_wants_certificates(certificates: Path, tmp_path: Path) -> None:
    """By the process that an engine starts for it, which has to be told whom to trust and who it is."""
    flags = [
        f"--security.{name}={certificates / 'server' / file}"
        for name, file in (("certificate", "certificate.pem"), ("key", "key.pem"), ("authority", "authority.pem"))
    ]
    tensor = np.arange(5, dtype=np.float32)
    with Topology(tmp_path / "logs", environment=ENVIRONMENT) as topology:
        command = ["weights", "--root", str(tmp_path / "weights"), "--address", "127.0.0.1:0", *flags]
        address = topology.start("weights", command).address
        with WeightsClient(address, security_settings=secured(certificates / "learner-main")) as learner:
            learner.publish(
                model="tiny", policy_type="flow", config_json="{}", spec=None, tensors={"a": tensor}, publish_id="run/1"
            )
            entries = learner.get_manifest("tiny").tensors
        into = np.zeros(tensor.nbytes, np.uint8)
        served = WeightsBringer(address, security_settings=secured(certificates / "server"))
        assert [entry.name for entry in served.fetch_into(entries, lambda entry: into)] == ["a"]
        assert into.tobytes() == tensor.tobytes()
        stranger = WeightsBringer(address, patience_s=0.0)
        with pytest.raises(Unreachable):
            list(stranger.fetch_into(entries, lambda entry: into))
