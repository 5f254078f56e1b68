"""A server of each path, one for all tests that leave it as they found it: only its engine process may be killed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="session")
def labs(checkpoints: Path) -> Iterator[Callable[[str], Lab]]:
    """A running server by its path, started when it is first asked for."""
    with Topology(checkpoints / "logs", environment=ENVIRONMENT) as topology:
        flags = ("--engine-restarts", "100", "--max-requests-hz", "100000")  # Robots here do what robots do not.
        yield functools.cache(lambda path: fault_lab.serve(topology, checkpoints, path, *flags))


@pytest.fixture(params=fault_lab.PATHS)
def lab(request: pytest.FixtureRequest, labs: Callable[[str], Lab]) -> Lab:
    return labs(request.param)


@pytest.fixture
def plain_lab(labs: Callable[[str], Lab]) -> Lab:
    """For what is the same on every path, since the front end decides it."""
    return labs("plain")
