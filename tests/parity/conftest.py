"""The fixtures are read and the weights drawn once a run; parameters are shared, no test may change them in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from policies.pi052.config import Precision
from policies.pi052.model import Pi052Network
from policies.pi052.policy import Pi052Policy
from policies.smolvla2.policy import SmolVLA2Policy
from tests.support import fused_lab

from . import fused_gpu, pi, smol
from .golden import Golden


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices: more threads only wait for each other on a shared machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pi05_golden() -> Golden:
    return Golden("pi05")


@pytest.fixture(scope="session")
def pi052_golden() -> Golden:
    return Golden("pi052")


@pytest.fixture(scope="session")
def pi05(pi05_golden: Golden) -> Pi052Policy:
    return pi.build(pi05_golden)


@pytest.fixture(scope="session")
def pi052(pi052_golden: Golden) -> Pi052Policy:
    return pi.build(pi052_golden)


@pytest.fixture(scope="session")
def smolvla_golden() -> Golden:
    return Golden("smolvla")


@pytest.fixture(scope="session")
def smolvla2_golden() -> Golden:
    return Golden("smolvla2")


@pytest.fixture(scope="session")
def smolvla(smolvla_golden: Golden) -> SmolVLA2Policy:
    return smol.build(smolvla_golden)


@pytest.fixture(scope="session")
def smolvla2(smolvla2_golden: Golden) -> SmolVLA2Policy:
    return smol.build(smolvla2_golden)


@pytest.fixture(scope="session")
def networks() -> tuple[Pi052Network, Pi052Network]:
    """On a GPU, the same weights in bfloat16, which the fused path takes, and float32."""
    served = fused_lab.network(fused_gpu.SIZES, device=fused_gpu.CUDA)
    plain = fused_lab.network(replace(fused_gpu.SIZES, precision=Precision.FLOAT32), device=fused_gpu.CUDA)
    plain.load_state_dict({name: value.float() for name, value in served.state_dict().items()})
    return served, plain
