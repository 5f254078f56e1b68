"""The pi052 that is served: random weights, and an instruction that makes every prompt of a chunk PROMPT_TOKENS long."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from manyhands.spec import Feature, FeatureKind, Spec
from policies import checkpoint
from policies import files as policy_files
from policies.configuration import Precision
from policies.pi052 import config as configs
from policies.pi052.config import NetworkConfig, Pi052Config
from policies.pi052.policy import Pi052Policy
from policies.policy import Sample, TextKind, TextRequest
from policies.prompts.locations import LOCATION_TOKENS
from services.loadtest import observations
from tests.support.text_lab import PI_SPECIAL, bytes_tokenizer

NAME = "pi052"
CAMERAS = ("base", "left_wrist", "right_wrist")
PROMPT_TOKENS = 200
# A range of the state in which whatever simulated robots measure is a bin of three digits: prompts are then equally long.
STATE_RANGE = (-10.0, 5.0)
WORDS = "put the red cube into the bin on the left, then the blue one beside it, and close the lid; "
# Written last, so that a checkpoint that has it is whole.
FACTS = "prompts.json"


def make(folder: Path, size: str, device: str) -> dict[str, object]:
    """Writes the checkpoint folder/NAME unless it is there; answers task, prompt_tokens, question_tokens, max_new_tokens.

    Args:
        size: full; tiny; or clock, a tiny network with the full one's pictures, actions and steps.

    In bfloat16 at full size; tokens are bytes with the special tokens of PaliGemma's tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / FACTS
    if not written.exists():
        policy = _random_policy(size, device)
        checkpoint.save(policy, folder / NAME)
        written.write_text(json.dumps(_facts(policy)))
    facts: dict[str, object] = json.loads(written.read_text())
    return facts


def _random_policy(size: str, device: str) -> Pi052Policy:
    torch.manual_seed(0)
    vocabulary = 257_152 if size == "full" else 8192
    fillers = vocabulary - len(PI_SPECIAL) - 256 - len(LOCATION_TOKENS)
    tokenizer = bytes_tokenizer(PI_SPECIAL, (*LOCATION_TOKENS, *(f"unused {index}" for index in range(fillers))))
    pixels = 16 if size == "tiny" else 224
    cameras = [
        Feature(name=f"observation.images.{name}", kind=FeatureKind.IMAGE, dtype="uint8", shape=(pixels, pixels, 3))
        for name in CAMERAS
    ]
    state = Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(8,))
    action = Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(8,))
    spec = Spec(observation=(*cameras, state), action=(action,), control_rate_hz=50.0)
    config = Pi052Config(network=NetworkConfig(precision=Precision.BFLOAT16), prompt_length=PROMPT_TOKENS, fast_weight=0.0)
    if size != "full":
        tiny = configs.dump(configs.TINY)
        if size == "clock":
            vision = {**tiny["network"]["vision"], "patch": 56}
            network = {"vision": vision, "image_height": pixels, "image_width": pixels, "action_size": 32}
            tiny |= {"horizon": 50, "num_steps": 10, "network": {**tiny["network"], **network}}
        config = configs.parse({**tiny, "network": {**tiny["network"], "vocabulary": vocabulary}, "byte_prompts": False,
                                "prompt_length": PROMPT_TOKENS, "fast_weight": 0.0})  # fmt: skip
    with torch.device("meta"):
        policy = Pi052Policy.from_config(configs.dump(config), spec)
    policy.to_empty(device=device)
    ranges = {"state_normalizer": STATE_RANGE, "action_normalizer": (-1.0, 1.0)}
    with torch.no_grad():
        for name, tensor in policy.state_dict().items():
            part, _, bound = name.rpartition(".")
            if part in ranges:
                tensor.fill_(ranges[part][bound == "second"])
            else:
                tensor.normal_(std=tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1)
    policy.take_files({policy_files.TOKENIZER: tokenizer.to_str().encode()})
    return policy.eval()


def _facts(policy: Pi052Policy) -> dict[str, object]:
    task = _task(len(policy.observation(samples(policy.spec, "")[0]).prompt.tokens))
    given = samples(policy.spec, task)
    lengths = {len(policy.observation(sample).prompt.tokens) for sample in given}
    if lengths != {PROMPT_TOKENS}:
        raise ValueError(
            f"prompts have {sorted(lengths)} tokens, not {PROMPT_TOKENS}; fit STATE_RANGE to what robots measure"
        )
    question = policy.question(given[0], TextRequest(kind=TextKind.SUBTASK))
    return {
        "task": task,
        "prompt_tokens": PROMPT_TOKENS,
        "question_tokens": len(question.prompt.tokens),
        "max_new_tokens": policy.config.max_new_tokens,
    }


def samples(spec: Spec, task: str) -> list[Sample]:
    """What the load test's robots send."""
    names = tuple(feature.name for feature in spec.observation)
    return [Sample(observation=observations.make(spec, names, seed), task=task) for seed in range(observations.NUM_VARIANTS)]


def _task(num_other_tokens: int) -> str:
    """A character is a token; the last one is no space, which might be left out."""
    return (WORDS * PROMPT_TOKENS)[: PROMPT_TOKENS - num_other_tokens - 1] + "."
