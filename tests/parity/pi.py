"""pi05 and pi052 on the golden fixtures: builds them, runs them, and measures every row of the parity table.

Each measure_* returns errors by name; limits are the aims of the fixtures' README. test_*.py asserts that all are within
them, test_mutations.py that a wrong implementation is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from manyhands.spec import Feature, FeatureKind, Spec
from policies import images, text
from policies.normalization import Normalization
from policies.pi052 import checkpoint_keys, flow, sampling
from policies.pi052 import model as pi052_model
from policies.pi052.config import NetworkConfig, Pi052Config, TowerSize, VisionSize, pi05_config
from policies.pi052.policy import Pi05Policy, Pi052Inputs, Pi052Policy
from policies.policy import CommittedPrefix
from policies.rtc import PrefixSchedule

from .golden import Golden, digest_errors, relative_error

AIM = 2e-6  # Prefix, flow tensor, chunks.
LOSS_AIM = 1e-6
GRADIENT_LIMIT = 1e-4
TIME_LIMIT = 1e-6
PICTURE_LIMIT = 1e-7  # Absolute.

Errors = dict[str, float]


# -- building ----------------------------------------------------------------------------------------------------------


def network_config(golden: Golden, **changes: Any) -> NetworkConfig:
    dims, config = golden.dims, golden.config
    language = dict(dims["vlm"])
    vocabulary = language.pop("vocab")
    height, width = config["image_resolution"]
    periods = {name: config[name] for name in ("min_period", "max_period") if name in config}
    return NetworkConfig(
        vision=VisionSize(**dims["vision"]),
        language=TowerSize(**language),
        expert=TowerSize(**dims["expert"]),
        vocabulary=vocabulary,
        image_height=height,
        image_width=width,
        action_size=dims["max_action_dim"],
        **periods,
        **changes,
    )


def spec_of(golden: Golden) -> Spec:
    config = golden.config
    cameras = [Feature(name=name, kind=FeatureKind.IMAGE, dtype="uint8", shape=(8, 8, 3)) for name in config["cameras"]]
    state = Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(config["state_dim"],))
    action = Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(config["action_dim"],))
    return Spec(observation=(*cameras, state), action=(action,), control_rate_hz=30.0)


def build(golden: Golden, *, weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> Pi052Policy:
    """With the fixture's weights; changes are of Pi052Config, network ones prefixed "network_"."""
    config = golden.config
    of_network = {name.removeprefix("network_"): changes.pop(name) for name in list(changes) if name.startswith("network_")}
    settings: dict[str, Any] = {
        "network": network_config(golden, **of_network),
        "horizon": config["chunk_size"],
        "state_normalization": Normalization.IDENTITY,
        "action_normalization": Normalization.IDENTITY,
    }
    is_pi05 = golden.policy == "pi05"
    if not is_pi05:
        settings |= {
            "flow_weight": config["flow_loss_weight"],
            "text_weight": config["text_loss_weight"],
            "fast_weight": config["fast_action_loss_weight"],
            "z_weight": config["text_ce_z_loss_weight"],
            "fast_skip_tokens": config["fast_skip_tokens"],
        }
    settings |= changes
    with torch.device("meta"):
        if is_pi05:
            policy: Pi052Policy = Pi05Policy(pi05_config(**settings), spec_of(golden))
        else:
            policy = Pi052Policy(Pi052Config(**settings), spec_of(golden))
    checkpoint_keys.load(policy.network, golden.weights if weights is None else weights)
    return policy


def pictures_of(golden: Golden, without: str | None = None) -> images.Pictures:
    cameras = golden.config["cameras"]
    height, width = golden.config["image_resolution"]
    present = {name: golden[f"in.{name}"] for name in cameras if name != without}
    return images.prepare_cameras(present, cameras, height, width)


def inputs_of(golden: Golden, *, without: str | None = None) -> Pi052Inputs:
    """Everything the fixture gives; in the order of cameras that the reference takes them."""
    pictures = pictures_of(golden, without)
    optional = {
        "labels": "in.text_labels",
        "predicts": "in.predict_actions",
        "fast_tokens": "in.action.tokens",
        "fast_valid": "in.action.token_mask",
        "fast_is_code": "in.action.code_token_mask",
    }
    return Pi052Inputs(
        pictures=torch.stack(pictures.values, dim=1),
        picture_valid=torch.stack(pictures.valid, dim=1),
        state=golden["in.observation.state"],
        tokens=golden["in.observation.language.tokens"],
        token_valid=golden["in.observation.language.attention_mask"],
        actions=functional.pad(golden["in.action"], (0, golden.dims["max_action_dim"] - golden.config["action_dim"])),
        **{name: golden[key] for name, key in optional.items() if key in golden},
    )


def acting(inputs: Pi052Inputs) -> Pi052Inputs:
    """The same as when the robot acts: nothing of what training knows."""
    return replace(inputs, labels=None, predicts=None, fast_tokens=None, fast_valid=None, fast_is_code=None, actions=None)


def draws_of(golden: Golden, repeats: int) -> flow.Draws:
    rows = repeats * golden["in.action"].shape[0]
    return flow.Draws(noise=golden["in.noise"][:rows], time=golden["in.time"][:rows])


# -- pi05 --------------------------------------------------------------------------------------------------------------


def missing_camera(golden: Golden, case: str) -> str | None:
    named: dict[str, str] = golden.meta["missing_camera"]
    return named.get(case)


def measure_pictures(golden: Golden) -> Errors:
    """Largest absolute difference by camera."""
    pictures = pictures_of(golden)
    return {
        name: float((value - golden[f"all.image.{name}"]).abs().max())
        for name, value in zip(pictures.names, pictures.values, strict=True)
    }


@torch.no_grad()
def measure_prefix(policy: Pi052Policy, golden: Golden, case: str = "") -> Errors:
    """case: "all." and so on of pi05; "" of pi052. Masks count as 0 or 1."""
    without = missing_camera(golden, case.removesuffix(".")) if case else None
    prefix = policy.embed_prefix(inputs_of(golden, without=without), fast=golden.policy == "pi052")
    return {
        "embeddings": relative_error(prefix.embeddings, golden[f"{case}prefix.emb"]),
        "valid": float(not torch.equal(prefix.valid, golden[f"{case}prefix.pad"])),
        "marks": float(not torch.equal(prefix.marks, golden[f"{case}prefix.att"])),
    }


@torch.no_grad()
def measure_flow_tensor(policy: Pi052Policy, golden: Golden, case: str) -> Errors:
    inputs = inputs_of(golden, without=missing_camera(golden, case))
    assert inputs.actions is not None
    state = policy.prefix_state(inputs, hidden=False)
    found = {}
    for index, time in enumerate(golden["in.time"]):
        draws = flow.Draws(noise=golden["in.noise"], time=time)
        errors, _ = flow.squared_errors(policy.network, state, inputs.actions, draws)
        found[f"flow.{index}"] = relative_error(errors[:, 0], golden[f"{case}.flow.{index}"])
    return found


@torch.no_grad()
def measure_time(policy: Pi052Policy, golden: Golden) -> Errors:
    config = policy.config.network
    embedded = pi052_model.embed_time(golden["in.time"].flatten(), config.expert.width, config.min_period, config.max_period)
    return {
        "time_emb": relative_error(embedded, golden["time_emb"]),
        "adarms_cond": relative_error(policy.network.condition(golden["in.time"][0]), golden["adarms_cond"]),
    }


@torch.no_grad()
def measure_chunks(policy: Pi052Policy, golden: Golden, case: str) -> Errors:
    inputs = acting(inputs_of(golden, without=missing_camera(golden, case)))
    begin = f"{case}.chunk."
    return {
        key: relative_error(policy.act(inputs, golden["in.noise"], num_steps=int(key.removeprefix(begin))), golden[key])
        for key in golden.tensors
        if key.startswith(begin)
    }


def committed_of(golden: Golden, delay: Sequence[int], execution_horizon: Sequence[int]) -> CommittedPrefix:
    previous = golden["in.rtc_prev"]
    rows, length, size = previous.shape
    padding = (0, golden.dims["max_action_dim"] - size, 0, golden.config["chunk_size"] - length)
    return CommittedPrefix(
        actions=functional.pad(previous, padding),
        length=torch.full((rows,), length),
        delay_steps=torch.tensor(delay),
        execution_horizon=torch.tensor(execution_horizon),
    )


@torch.no_grad()
def measure_guided(policy: Pi052Policy, golden: Golden) -> Errors:
    inputs = acting(inputs_of(golden))
    rows = inputs.tokens.shape[0]
    velocity = sampling.velocity_of(policy.network, policy.prefix_state(inputs, hidden=False))
    found = {}
    for case in golden.meta["rtc"]:
        chunk = sampling.guided_chunk(
            velocity,
            golden["in.noise"],
            case["steps"],
            committed=committed_of(golden, [case["inference_delay"]] * rows, [case["execution_horizon"]] * rows),
            schedule=PrefixSchedule[case["schedule"]],
            max_guidance_weight=case["max_guidance_weight"],
        )
        found[case["key"]] = relative_error(chunk, golden[case["key"]])
    return found


# -- pi052 -------------------------------------------------------------------------------------------------------------


def case_settings(golden: Golden, case: str) -> dict[str, Any]:
    """Of K5_ki0 and its like, and of those with a note."""
    described = golden.meta["cases"][case]
    repeats = described.get("flow_num_repeats", 5 if case.startswith("K5") else 1)
    insulation = described.get("knowledge_insulation", not case.endswith("noki"))
    return {"flow_repeats": repeats, "knowledge_insulation": insulation}


def case_inputs(golden: Golden, case: str) -> Pi052Inputs:
    inputs = inputs_of(golden)
    if case == "text_only":
        assert inputs.predicts is not None
        return replace(inputs, predicts=torch.zeros_like(inputs.predicts))
    if "flow_only" in case:
        return replace(inputs, labels=None, fast_tokens=None, fast_valid=None, fast_is_code=None)
    return inputs


NAMES = {"flow_loss": "flow", "text_loss": "text", "fast_action_loss": "fast"}


@torch.no_grad()
def measure_losses(policy: Pi052Policy, golden: Golden, case: str) -> Errors:
    draws, inputs = draws_of(golden, policy.config.flow_repeats), case_inputs(golden, case)
    terms = policy.loss_terms(inputs, draws)
    means = {name: term.mean for name, term in terms.items()} | {"total": policy.loss_of(inputs, draws).total}
    expected = golden.meta["cases"][case]
    found = {
        name: abs(float(means[NAMES.get(name, name)]) / expected[name] - 1.0)
        for name in ("flow_loss", "text_loss", "fast_action_loss", "total")
        if name in expected
    }
    key = f"{case}.total_per_sample"
    if key in golden:
        weights = policy.loss_weights()
        per_sample = torch.stack([weights[name] * term.per_sample for name, term in terms.items()]).sum(dim=0)
        found["total_per_sample"] = relative_error(per_sample, golden[key])
    return found


def gradients(policy: Pi052Policy, golden: Golden, case: str) -> dict[str, torch.Tensor | None]:
    """Of the total, under lerobot's names."""
    policy.zero_grad(set_to_none=True)
    torch.autograd.backward(policy.loss_of(case_inputs(golden, case), draws_of(golden, policy.config.flow_repeats)).total)
    found = {checkpoint_keys.to_lerobot(name): p.grad for name, p in policy.network.named_parameters()}
    policy.zero_grad(set_to_none=True)
    return found


def measure_gradients(policy: Pi052Policy, golden: Golden, case: str) -> Errors:
    """Worst difference of norm, first values and probes, each as a part of the recorded norm."""
    return digest_errors(gradients(policy, golden, case), golden.meta["grads"][case])


def is_language_model(name: str) -> bool:
    """Of lerobot's names: everything that insulation keeps the flow loss from."""
    return ".paligemma." in name


@torch.no_grad()
def measure_joint_chunks(policy: Pi052Policy, golden: Golden) -> Errors:
    inputs = acting(inputs_of(golden))
    noise = golden["in.noise"][: inputs.tokens.shape[0]]
    marked = replace(inputs, token_marks=golden["in.causal_marks"])
    return {
        "chunk.4": relative_error(policy.act(inputs, noise, num_steps=4), golden["chunk.4"]),
        "causal_marks": relative_error(policy.act(marked, noise, num_steps=4), golden["chunk.4.causal_marks"]),
    }


def prompt_of(golden: Golden, key: str) -> Pi052Inputs:
    """An unpadded prompt with the pictures of sample 0."""
    inputs = inputs_of(golden)
    tokens = golden[f"in.{key}"]
    return replace(
        acting(inputs),
        pictures=inputs.pictures[:1],
        picture_valid=inputs.picture_valid[:1],
        state=inputs.state[:1],
        tokens=tokens,
        token_valid=torch.ones_like(tokens, dtype=torch.bool),
    )


def rules_of(golden: Golden, case: dict[str, Any]) -> text.Decoding:
    return text.Decoding(
        max_new_tokens=case["max_new_tokens"],
        min_new_tokens=case["min_new_tokens"],
        end_token=case["eos_token_id"],
        special_tokens=tuple(case.get("special_ids", ())),
        suppress_locations=case["suppress_loc_tokens"],
        fast_skip_tokens=golden.config["fast_skip_tokens"],
    )


@torch.no_grad()
def generated_ids(policy: Pi052Policy, golden: Golden, case: dict[str, Any]) -> list[int]:
    state = policy.prefix_state(prompt_of(golden, case["tokens"]), hidden=True)
    return text.generate_ids(policy.network, state, rules_of(golden, case))[0]


def measure_text(policy: Pi052Policy, golden: Golden) -> Errors:
    """0 where the ids are the same, else 1."""
    return {
        f"{index}.{case['tokens']}": float(generated_ids(policy, golden, case) != case["ids"])
        for index, case in enumerate(golden.meta["select"])
    }
