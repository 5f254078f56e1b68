"""Which path a loaded policy is served on."""

from __future__ import annotations

import torch

from manyhands.engine.v1 import engine_pb2
from manyhands.errors import InvalidInput, NotOffered
from policies.pi052.policy import Pi052Policy

from .fused_model import MAX_TEXTS, FusedModel, can_be_fused
from .models import AnyPolicy, ServedModel

# Matrix units multiply FP8 from this one on.
FP8_CAPABILITY = (8, 9)


def serve_model(name: str, policy: AnyPolicy, start: engine_pb2.Start) -> ServedModel:
    """
    Args:
        policy: On the CPU.

    Raises:
        NotOffered: The fused path, or FP8, is asked for and this policy or this device has none.
        InvalidInput: FP8 is asked for on the plain path.
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
    if start.fp8:
        _check_fp8(name, policy, device, is_fused=wanted)
    if wanted and can_be_fused(policy):
        assert isinstance(policy, Pi052Policy)
        return FusedModel(name, policy, device, max_rows=start.max_batch, max_texts=MAX_TEXTS, fp8=start.fp8)
    return ServedModel(name, policy.to(device))


def _check_fp8(name: str, policy: AnyPolicy, device: torch.device, *, is_fused: bool) -> None:
    """is_fused: Whether the path is the fused one, for policies that have it."""
    if not is_fused:
        raise InvalidInput("is only there on the fused path; give --path fused, or serve without --fp8", field="fp8")
    if not can_be_fused(policy):
        raise NotOffered(
            f"{name!r} of type {policy.type_name!r} has no fused path, and FP8 is only there; serve it without --fp8",
            field="fp8",
        )
    # On the CPU FP8 is emulated: exact and slow, for tests.
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        raise NotOffered(
            f"needs a GPU of compute capability {'.'.join(map(str, FP8_CAPABILITY))} or newer, {device} has "
            f"{'.'.join(map(str, capability))}; serve without --fp8",
            field="fp8",
        )
