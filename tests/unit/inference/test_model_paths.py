"""Which path a policy is served on when FP8 is asked for, and what is told where it cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyhands.engine.v1 import engine_pb2
from manyhands.errors import InvalidInput, ManyhandsError, NotOffered
from services.inference import model_paths
from services.inference.fused_model import FusedModel
from services.inference.main import Settings, start_message
from tests.support import prompted_lab

AUTO, PLAIN, FUSED = engine_pb2.ENGINE_PATH_UNSPECIFIED, engine_pb2.ENGINE_PATH_PLAIN, engine_pb2.ENGINE_PATH_FUSED


def start(path: engine_pb2.EnginePath, device: str = "cpu", *, fp8: bool = True) -> engine_pb2.Start:
    return engine_pb2.Start(device=device, path=path, max_batch=2, fp8=fp8)


def test_fp8_is_told_to_the_engine_and_off_by_default() -> None:
    for flags, expected in (({}, False), ({"fp8": True}, True)):
        assert start_message(Settings(model={"pi052": "folder"}, **flags)).fp8 is expected


def test_fp8_is_served_on_the_fused_path() -> None:
    policy = prompted_lab.policy("pi052", max_new_tokens=8).eval()
    found = {}
    for fp8 in (False, True):
        model = model_paths.serve_model("pi052", policy, start(FUSED, fp8=fp8))
        assert isinstance(model, FusedModel)
        assert model.fused.settings.fp8 is fp8
        found[fp8] = model.canary()
    assert np.isfinite(found[True]).all()
    assert not np.array_equal(found[True], found[False])


@pytest.mark.parametrize(
    ("policy_type", "path", "device", "error", "says"),
    [
        ("pi052", PLAIN, "cuda", InvalidInput, "--path fused"),
        ("pi052", AUTO, "cpu", InvalidInput, "--path fused"),
        ("smolvla2", AUTO, "cuda", NotOffered, "'tiny' of type 'smolvla2' has no fused path"),
        ("smolvla2", FUSED, "cuda", NotOffered, "--path plain"),
        ("pi052", FUSED, "cuda", NotOffered, "capability 8.9 or newer, cuda has 8.6; serve without --fp8"),
    ],
)
def test_fp8_that_cannot_be_is_refused_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
    policy_type: str,
    path: engine_pb2.EnginePath,
    device: str,
    error: type[ManyhandsError],
    says: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(error) as refused:
        model_paths.serve_model("tiny", prompted_lab.policy(policy_type), start(path, device))
    assert says in str(refused.value)
    assert refused.value.field == ("path" if says == "--path plain" else "fp8")


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_a_gpu_that_multiplies_fp8_is_given_to_the_fused_path(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    given = {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(model_paths, "FusedModel", lambda name, policy, device, **options: given.update(options))
    model_paths.serve_model("tiny", prompted_lab.policy("pi052"), start(AUTO, "cuda"))
    assert given["fp8"] is True
