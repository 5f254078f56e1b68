"""Which path a loaded policy is served on."""

from __future__ import annotations

import torch

from manyhands.engine.v1 import engine_pb2
from manyhands.errors import NotOffered
from policies.pi052.policy import Pi052Policy

from .fused_model import MAX_TEXTS, FusedModel, can_be_fused
from .models import AnyPolicy, ServedModel


def serve_model(name: str, policy: AnyPolicy, start: engine_pb2.Start) -> ServedModel:
    """
    Args:
        policy: On the CPU.

    Raises:
        NotOffered: The fused path is asked for and this policy has none.
    """
    device = torch.device(start.device)
    is_asked_for = start.path == engine_pb2.ENGINE_PATH_FUSED
    if is_asked_for and not can_be_fused(policy):
        raise NotOffered(
            f"{name!r} of type {policy.type_name!r} has no fused path (pi052 and pi05 have one, but for joint prompts); "
            "serve it with --path plain",
            field="path",
        )
    wanted = is_asked_for or (start.path == engine_pb2.ENGINE_PATH_UNSPECIFIED and device.type == "cuda")
    if wanted and can_be_fused(policy):
        assert isinstance(policy, Pi052Policy)
        return FusedModel(name, policy, device, max_rows=start.max_batch, max_texts=MAX_TEXTS)
    return ServedModel(name, policy.to(device))
