"""A server of each path, one for all tests that leave it as they found it: only its engine process may be killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import Topology
from tests.support import fault_lab
from tests.support.fault_lab import Lab
from tests.support.inference_lab import ENVIRONMENT


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    fault_lab.save_checkpoints(folder)
    return folder


@pytest.fixture(scope="session", params=fault_lab.PATHS)
def lab(request: pytest.FixtureRequest, checkpoints: Path) -> Iterator[Lab]:
    with Topology(checkpoints / f"logs-{request.param}", environment=ENVIRONMENT) as topology:
        yield fault_lab.serve(topology, checkpoints, request.param, "--engine-restarts", "100")
