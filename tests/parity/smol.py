"""SmolVLA and SmolVLA2 on the golden fixtures, as pi.py does for pi05 and pi052: rows 1, 5, 11 and 12 of the table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from policies import flow_matching, images, rows, text
from policies.configuration import TowerSize, VisionSize
from policies.normalization import Normalization
from policies.policy import CommittedPrefix
from policies.rtc import PrefixSchedule
from policies.smolvla2 import checkpoint_keys
from policies.smolvla2.config import NetworkConfig, SmolVLA2Config, smolvla_config
from policies.smolvla2.policy import SmolVLA2Inputs, SmolVLA2Policy, SmolVLAPolicy

from . import pi
from .golden import Golden, digest_errors, relative_error
from .pi import AIM, GRADIENT_LIMIT, LOSS_AIM, PICTURE_LIMIT, Errors

__all__ = ["AIM", "GRADIENT_LIMIT", "LOSS_AIM", "PICTURE_LIMIT"]


# -- building ----------------------------------------------------------------------------------------------------------


def network_config(golden: Golden, **changes: Any) -> NetworkConfig:
    dims, config = golden.dims, golden.config
    language, expert = dict(dims["vlm"]), dict(dims["expert"])
    vocabulary, rms_eps = language.pop("vocab"), language.pop("rms_eps")
    every = expert.pop("self_attn_every_n_layers")
    expert.pop("expert_width_multiplier")
    vision = dict(dims["vision"])
    vision.pop("image")
    shuffle = vision.pop("scale_factor")
    width, height = config["resize_imgs_with_padding"]
    settings: dict[str, Any] = {
        "vision": VisionSize(**vision),
        "language": TowerSize(**language),
        "expert": TowerSize(**expert),
        "vocabulary": vocabulary,
        "rms_eps": rms_eps,
        "image_height": height,
        "image_width": width,
        "shuffle": shuffle,
        "state_size": dims["max_state_dim"],
        "action_size": dims["max_action_dim"],
        "self_attention_every": every if "cross" in config["attention_mode"] else 1,
        "prefix_length": max(0, config["prefix_length"]),
        "image_special_tokens": config["add_image_special_tokens"],
        "min_period": config["min_period"],
        "max_period": config["max_period"],
    }
    return NetworkConfig(**(settings | changes))


def build(golden: Golden, *, weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> SmolVLA2Policy:
    """With the fixture's weights; changes are of SmolVLA2Config, network ones prefixed "network_"."""
    config = golden.config
    of_network = {name.removeprefix("network_"): changes.pop(name) for name in list(changes) if name.startswith("network_")}
    settings: dict[str, Any] = {
        "network": network_config(golden, **of_network),
        "horizon": config["chunk_size"],
        "state_normalization": Normalization.IDENTITY,
        "action_normalization": Normalization.IDENTITY,
        "train_expert_only": config["train_expert_only"],
        "freeze_vision": config["freeze_vision_encoder"],
    }
    if golden.policy == "smolvla2":
        settings |= {"flow_weight": config["flow_loss_weight"], "text_weight": config["text_loss_weight"]}
    settings |= changes
    with torch.device("meta"):
        if golden.policy == "smolvla":
            policy: SmolVLA2Policy = SmolVLAPolicy(smolvla_config(**settings), pi.spec_of(golden))
        else:
            policy = SmolVLA2Policy(SmolVLA2Config(**settings), pi.spec_of(golden))
    checkpoint_keys.load(policy.network, golden.weights if weights is None else weights)
    return policy


def pictures_of(golden: Golden, without: str | None = None) -> images.Pictures:
    cameras = golden.config["cameras"]
    width, height = golden.config["resize_imgs_with_padding"]
    present = {name: golden[f"in.{name}"] for name in cameras if name != without and f"in.{name}" in golden}
    return images.prepare_cameras(
        present,
        cameras,
        height,
        width,
        padding=images.Padding.LEFT_TOP,
        max_missing=golden.config["empty_cameras"],
    )


def inputs_of(golden: Golden, case: str = "all") -> SmolVLA2Inputs:
    """Everything the fixture gives; in the order of cameras that the reference takes them."""
    pictures = pictures_of(golden, golden.meta.get("missing_camera", {}).get(case))
    valid = torch.stack(pictures.valid, dim=1)
    if case.startswith("masked"):
        valid[:, 0] = golden["in.camera0_padding_mask"]
    return SmolVLA2Inputs(
        pictures=torch.stack(pictures.values, dim=1),
        picture_valid=valid,
        state=golden["in.observation.state"],
        tokens=golden["in.observation.language.tokens"],
        token_valid=golden["in.observation.language.attention_mask"],
        labels=golden.tensors.get("in.text_labels"),
        predicts=golden.tensors.get("in.predict_actions"),
        actions=functional.pad(golden["in.action"], (0, golden.dims["max_action_dim"] - golden.config["action_dim"])),
        is_pad=golden["in.action_is_pad"],
    )


def acting(inputs: SmolVLA2Inputs) -> SmolVLA2Inputs:
    """The same as when the robot acts: nothing of what training knows."""
    return replace(inputs, labels=None, predicts=None, actions=None, is_pad=None)


# -- acting ------------------------------------------------------------------------------------------------------------


def measure_pictures(golden: Golden) -> Errors:
    """Largest absolute difference by camera."""
    pictures = pictures_of(golden)
    return {
        name: float((value - golden[f"all.image.{name}"]).abs().max())
        for name, value in zip(pictures.names, pictures.values, strict=True)
        if f"all.image.{name}" in golden
    }


@torch.no_grad()
def measure_prefix(policy: SmolVLA2Policy, golden: Golden, case: str = "") -> Errors:
    """case: "all." and so on of smolvla; "" of smolvla2. Masks count as 0 or 1."""
    inputs = acting(inputs_of(golden, case.removesuffix(".") or "all"))
    prefix = policy.embed_prefix(inputs, inputs.state)
    return {
        "embeddings": relative_error(prefix.embeddings, golden[f"{case}prefix.emb"]),
        "valid": float(not torch.equal(prefix.valid, golden[f"{case}prefix.pad"])),
        "marks": float(not torch.equal(prefix.marks, golden[f"{case}prefix.att"])),
    }


@torch.no_grad()
def measure_suffix(policy: SmolVLA2Policy, golden: Golden) -> Errors:
    found = policy.network.embed_actions(golden["in.noise"], golden["in.time"][0])
    return {"suffix.emb": relative_error(found, golden["suffix.emb"])}


@torch.no_grad()
def measure_flow_tensor(policy: SmolVLA2Policy, golden: Golden, case: str) -> Errors:
    inputs = inputs_of(golden, case)
    state = policy.action_state(inputs)
    return {
        f"flow.{index}": relative_error(
            policy.squared_errors(inputs, state, golden["in.noise"], time), golden[f"{case}.flow.{index}"]
        )
        for index, time in enumerate(golden["in.time"])
    }


@torch.no_grad()
def measure_chunks(policy: SmolVLA2Policy, golden: Golden, case: str = "") -> Errors:
    """case: "all." and so on of smolvla; "" of smolvla2."""
    inputs = acting(inputs_of(golden, case.removesuffix(".") or "all"))
    begin = f"{case}chunk."
    return {
        key: relative_error(policy.act(inputs, golden["in.noise"], num_steps=int(key.removeprefix(begin))), golden[key])
        for key in golden.tensors
        if key.startswith(begin)
    }


@torch.no_grad()
def guided_chunk(
    policy: SmolVLA2Policy, golden: Golden, case: dict[str, Any], committed: CommittedPrefix, of_fixture: torch.Tensor
) -> torch.Tensor:
    """Rows of the fixture at once, through the network's steps, as a server does."""
    inputs = rows.select(acting(inputs_of(golden)), of_fixture)
    seen = policy.network.seen(policy.action_state(inputs))
    return flow_matching.euler(
        lambda x, time: policy.network.expert_step(seen, x, time),
        golden["in.noise"][of_fixture],
        case["steps"],
        committed=committed,
        schedule=PrefixSchedule[case["schedule"]],
        max_guidance_weight=case["max_guidance_weight"],
    )


def measure_guided(policy: SmolVLA2Policy, golden: Golden) -> Errors:
    count = golden["in.noise"].shape[0]
    found = {}
    for case in golden.meta["rtc"]:
        committed = pi.committed_of(golden, [case["inference_delay"]] * count, [case["execution_horizon"]] * count)
        chunk = guided_chunk(policy, golden, case, committed, torch.arange(count))
        found[case["key"]] = relative_error(chunk, golden[case["key"]])
    return found


# -- losses ------------------------------------------------------------------------------------------------------------


def case_inputs(golden: Golden, case: str) -> SmolVLA2Inputs:
    inputs = inputs_of(golden)
    if case in ("unmasked", "no_pad"):
        inputs = replace(inputs, is_pad=None)
    if case == "text_only":
        inputs = replace(inputs, predicts=torch.zeros_like(golden["in.predict_actions"]))
    if case == "flow_only":
        inputs = replace(inputs, labels=None)
    return inputs


def case_time(golden: Golden, case: str) -> torch.Tensor:
    named = golden.meta["cases"][case]["time"]
    return golden["in.time"][int(named.removeprefix("in.time[").removesuffix("]"))]


@torch.no_grad()
def measure_losses(policy: SmolVLA2Policy, golden: Golden, case: str) -> Errors:
    inputs, time = case_inputs(golden, case), case_time(golden, case)
    terms = policy.loss_terms(inputs, golden["in.noise"], time)
    found = {"total": policy.loss_of(inputs, golden["in.noise"], time).total}
    found |= {f"{name}_loss": term.mean for name, term in terms.items()}
    expected = golden.meta["cases"][case]
    names = {"loss": "total", "total": "total", "flow_loss": "flow_loss", "text_loss": "text_loss"}
    errors = {
        theirs: abs(float(found[ours]) - expected[theirs]) / abs(expected[theirs])
        for theirs, ours in names.items()
        if theirs in expected
    }
    if case == "masked":
        errors["per_sample"] = relative_error(terms["flow"].per_sample, golden["loss.per_sample"])
    return errors


def measure_gradients(policy: SmolVLA2Policy, golden: Golden, case: str) -> Errors:
    policy.zero_grad(set_to_none=True)
    total = policy.loss_of(case_inputs(golden, case), golden["in.noise"], case_time(golden, case)).total
    torch.autograd.backward(total)
    actual = {checkpoint_keys.to_lerobot(name): p.grad for name, p in policy.network.named_parameters()}
    policy.zero_grad(set_to_none=True)
    return digest_errors(actual, golden.meta["grads"][case])


def frozen_names(policy: SmolVLA2Policy) -> set[str]:
    return {checkpoint_keys.to_lerobot(n) for n, p in policy.network.named_parameters() if not p.requires_grad}


# -- text --------------------------------------------------------------------------------------------------------------


def prompt_of(golden: Golden, key: str) -> SmolVLA2Inputs:
    """An unpadded prompt with the pictures and state of sample 0."""
    inputs = acting(inputs_of(golden))
    tokens = golden[f"in.{key}"]
    return replace(
        inputs,
        pictures=inputs.pictures[:1],
        picture_valid=inputs.picture_valid[:1],
        state=inputs.state[:1],
        tokens=tokens,
        token_valid=torch.ones_like(tokens, dtype=torch.bool),
    )


def rules_of(case: dict[str, Any]) -> text.Decoding:
    return text.Decoding(
        max_new_tokens=case["max_new_tokens"],
        min_new_tokens=case["min_new_tokens"],
        end_token=case["eos_token_id"],
        special_tokens=tuple(case["special_ids"]),
    )


@torch.no_grad()
def generated_ids(policy: SmolVLA2Policy, golden: Golden, case: dict[str, Any]) -> list[int]:
    state = policy.text_state(prompt_of(golden, case["tokens"]))
    return text.generate_ids(policy.network, state, rules_of(case))[0]


def measure_text(policy: SmolVLA2Policy, golden: Golden) -> Errors:
    """0 where the ids are the same, else 1."""
    return {
        f"{index}.{case['tokens']}": float(generated_ids(policy, golden, case) != case["ids"])
        for index, case in enumerate(golden.meta["select"])
    }
