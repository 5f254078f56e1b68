"""Runs lerobot 0.6.1 for test_round_trip.py, in lerobot's own environment: python reference.py JOB.json

A job says what to do with a folder:
    "load"    a policy and its processors from it, as lerobot's users do
    "save"    a policy with random weights and its processors into it, likewise
Either way the policy then acts on the job's samples; what comes out goes to the job's "output", a safetensors file.

lerobot names network sizes and has none small enough for a test, so its sizes are replaced by the job's "dims". Nothing else
of it is. This file imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import tokenizer_processor
from safetensors.torch import load_file, save_file


def main(job: dict[str, Any]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = Path(job["folder"])
    make = pi05 if job["type"] == "pi05" else smolvla
    policy_class, config_class = make(job["dims"])
    if job["action"] == "load":
        policy = policy_class.from_pretrained(folder)
        check_loaded(policy, load_file(folder / "model.safetensors"))
        overrides = {"tokenizer_processor": {"tokenizer_name": str(folder / "tokenizer")}}
        processors = make_pre_post_processors(policy.config, str(folder), preprocessor_overrides=overrides)
    else:
        policy, processors = fresh(job, policy_class, config_class)
        policy.save_pretrained(folder)
        for processor in processors:
            processor.save_pretrained(folder)
    save_file(act(policy, *processors, job), job["output"])


def pi05(dims: dict[str, Any]) -> tuple[Any, Any]:
    from lerobot.policies.pi05 import modeling_pi05
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    def tower(variant: str) -> Any:
        size = dims["vlm" if variant == "gemma_2b" else "expert"]
        return modeling_pi05.GemmaConfig(
            size["width"], size["depth"], size["mlp"], size["heads"], size["kv_heads"], size["head_dim"]
        )

    original = modeling_pi05.PaliGemmaForConditionalGenerationWithPiGemma

    def with_small_vision(config: Any) -> Any:
        vision, size = config.vision_config, dims["vision"]
        vision.hidden_size, vision.num_hidden_layers = size["width"], size["depth"]
        vision.intermediate_size, vision.num_attention_heads = size["mlp"], size["heads"]
        vision.projection_dim = config.projection_dim = dims["vlm"]["width"]
        return original(config=config)

    modeling_pi05.get_gemma_config = tower
    modeling_pi05.PaliGemmaForConditionalGenerationWithPiGemma = with_small_vision
    return modeling_pi05.PI05Policy, PI05Config


def smolvla(dims: dict[str, Any]) -> tuple[Any, Any]:
    from lerobot.policies.smolvla import modeling_smolvla, smolvlm_with_expert
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from transformers import SmolVLMConfig

    text, vision = dims["vlm"], dims["vision"]
    small = SmolVLMConfig(
        scale_factor=vision["scale_factor"],
        vision_config={
            "hidden_size": vision["width"],
            "num_hidden_layers": vision["depth"],
            "intermediate_size": vision["mlp"],
            "num_attention_heads": vision["heads"],
            "patch_size": vision["patch"],
            "image_size": vision["image"],
        },
        text_config={
            "model_type": "llama",
            "hidden_size": text["width"],
            "num_hidden_layers": text["depth"],
            "intermediate_size": text["mlp"],
            "num_attention_heads": text["heads"],
            "num_key_value_heads": text["kv_heads"],
            "head_dim": text["head_dim"],
            "vocab_size": text["vocab"],
            "rms_norm_eps": text["rms_eps"],
            "pad_token_id": 2,
        },
        tie_word_embeddings=False,
    )
    special = SimpleNamespace(fake_image_token_id=5, global_image_token_id=6)
    smolvlm_with_expert.AutoConfig = SimpleNamespace(from_pretrained=lambda _: small)
    smolvlm_with_expert.AutoProcessor = SimpleNamespace(from_pretrained=lambda _: SimpleNamespace(tokenizer=special))
    return modeling_smolvla.SmolVLAPolicy, SmolVLAConfig


def fresh(job: dict[str, Any], policy_class: Any, config_class: Any) -> tuple[Any, Any]:
    """A policy with random weights everywhere, and processors with the job's statistics."""
    original = tokenizer_processor.AutoTokenizer
    # lerobot's code names its tokenizer, which is not on this machine.
    tokenizer_processor.AutoTokenizer = SimpleNamespace(from_pretrained=lambda _: original.from_pretrained(job["tokenizer"]))
    features = {
        kind: {
            name: PolicyFeature(FeatureType(feature["type"]), tuple(feature["shape"])) for name, feature in job[kind].items()
        }
        for kind in ("input_features", "output_features")
    }
    mapping = {name: NormalizationMode(mode) for name, mode in job["normalization_mapping"].items()}
    config = config_class(**features, normalization_mapping=mapping, device="cpu", **job["config"])
    policy = policy_class(config)
    for parameter in policy.parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        offset = parameter.detach().clone() if parameter.ndim == 1 else 0.0
        parameter.data = torch.randn_like(parameter) * spread + offset
    statistics = {
        feature: {name: np.asarray(value, dtype=np.float32) for name, value in values.items()}
        for feature, values in job["statistics"].items()
    }
    return policy, make_pre_post_processors(config, dataset_stats=statistics)


def check_loaded(policy: Any, written: dict[str, torch.Tensor]) -> None:
    """lerobot only warns, and goes on with random weights, where loading failed."""
    state = policy.state_dict()
    assert state.keys() == written.keys(), f"keys differ: {sorted(state.keys() ^ written.keys())[:4]}"
    for name, tensor in written.items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), f"{name} was not loaded"


def act(policy: Any, before: Any, after: Any, job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The chunk in the robot's units, and what the network got: numbers in model space, tokens."""
    given = load_file(job["samples"])
    found: dict[str, list[torch.Tensor]] = {}
    for row, task in enumerate(job["tasks"]):
        sample: dict[str, Any] = {"task": [task], "action": given["action"][row : row + 1]}
        for name, value in given.items():
            if name.startswith("observation.images."):
                sample[name] = value[row : row + 1].permute(0, 3, 1, 2).float() / 255.0
            elif name.startswith("observation."):
                sample[name] = value[row : row + 1]
        batch = before(sample)
        chunk = after(policy.predict_action_chunk(dict(batch), noise=given["noise"][row : row + 1]))
        mask = batch["observation.language.attention_mask"][0].bool()
        found.setdefault("chunk", []).append(chunk[0])
        found.setdefault("state", []).append(batch["observation.state"][0])
        found.setdefault("action", []).append(batch["action"][0])
        found[f"tokens.{row}"] = [batch["observation.language.tokens"][0][mask]]
    return {name: values[0] if name.startswith("tokens.") else torch.stack(values) for name, values in found.items()}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
