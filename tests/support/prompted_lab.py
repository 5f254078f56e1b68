"""Small policies with prompts from real tokenizers' files, of every type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from manyhands.spec import Feature, FeatureKind, Spec
from policies import checkpoint, fast, registry
from policies import files as policy_files
from policies.policy import Policy, Sample
from policies.prompts.locations import LOCATION_TOKENS

from .text_lab import PI_SPECIAL, SMOL_SPECIAL, bytes_tokenizer

CPU = torch.device("cpu")
TYPES = ("pi05", "pi052", "smolvla", "smolvla2")
CAMERA, STATE, ACTION, HORIZON = "observation.images.front", "observation.state", "action", 6
SPEC = Spec(
    observation=(
        Feature(name=CAMERA, kind=FeatureKind.IMAGE, dtype="uint8", shape=(16, 16, 3)),
        Feature(name=STATE, kind=FeatureKind.STATE, dtype="float32", shape=(2,)),
    ),
    action=(Feature(name=ACTION, kind=FeatureKind.ACTION, dtype="float32", shape=(2,)),),
    control_rate_hz=30.0,
)
_UNUSED = 3000  # Room for FAST codes below the end of the vocabulary.


def tokenizer_files(policy_type: str, *, with_fast: bool = True) -> dict[str, bytes]:
    """Tokenizers of a byte a token with the special tokens of the real ones, and a FAST tokenizer for HORIZON x 2 chunks."""
    if policy_type.startswith("smolvla"):
        return {policy_files.TOKENIZER: bytes_tokenizer(SMOL_SPECIAL).to_str().encode()}
    unused = tuple(f"unused {i}" for i in range(_UNUSED))
    made = {policy_files.TOKENIZER: bytes_tokenizer(PI_SPECIAL, (*LOCATION_TOKENS, *unused)).to_str().encode()}
    if policy_type == "pi052" and with_fast:
        chunks = np.random.default_rng(0).normal(size=(30, HORIZON, 2)).clip(-1.5, 1.5)
        names = (policy_files.ACTION_TOKENIZER, policy_files.ACTION_TOKENIZER_CONFIG)
        made |= dict(zip(names, fast.fit(chunks).contents(), strict=True))
    return made


def policy(
    policy_type: str,
    *,
    with_fast: bool = True,
    files: Mapping[str, bytes] | None = None,
    prompts: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Policy[Any]:
    """A tiny network with statistics.

    Args:
        files: Besides the tokenizers.
        prompts, changes: Of the configuration.
    """
    tokenizers = tokenizer_files(policy_type, with_fast=with_fast)
    vocabulary = len(bytes_tokenizer(SMOL_SPECIAL).get_vocab())
    if not policy_type.startswith("smolvla"):
        vocabulary = len(PI_SPECIAL) + 256 + len(LOCATION_TOKENS) + _UNUSED
    tiny = registry.policy_class(policy_type).tiny_config()
    config = {**tiny, "network": {**tiny["network"], "vocabulary": vocabulary}, "byte_prompts": False, "horizon": HORIZON}
    config |= {"prompt_length": 96, **changes}
    if prompts is not None:
        config["prompts"] = dict(prompts)
    torch.manual_seed(0)
    made = checkpoint.build(policy_type, config, SPEC, {**tokenizers, **(files or {})})
    ones = {"q01": -np.ones(2), "q99": np.ones(2), "mean": np.zeros(2), "std": np.ones(2)}
    made.set_statistics({STATE: ones, ACTION: ones})
    return made


def sample(*, task: str = "tidy up", subtask: str = "grasp the cup", train: bool = False) -> Sample:
    """subtask: An annotation from the start of the episode; "" for none."""
    rows = [{"role": "assistant", "content": subtask, "style": "subtask", "timestamp": 0.0}] if subtask else []
    return Sample(
        observation={CAMERA: np.zeros((16, 16, 3), dtype=np.uint8), STATE: np.array([0.5, -0.5], dtype=np.float32)},
        task=task,
        actions=np.full((HORIZON, 2), 0.3, dtype=np.float32) if train else None,
        annotations={"persistent": rows},
    )
