"""pi052 on its own prompts, from annotated samples to losses, actions and text; network and tokenizer are small."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from manyhands.spec import Feature, FeatureKind, Spec
from policies import fast
from policies.losses import IGNORED_LABEL
from policies.pi052.config import NetworkConfig, Pi052Config, TowerSize, VisionSize
from policies.pi052.policy import Pi052Policy
from policies.policy import Sample, TextKind, TextRequest
from policies.prompt import Prompter
from policies.prompts.pi052 import Pi052Prompter, Pi052PromptOptions
from policies.recipes import recipe as recipes
from tests.support import prompted_lab
from tests.support.text_lab import pi_tokenizer

CAMERA, HORIZON = "observation.images.front", 6
SPEC = Spec(
    observation=(
        Feature(name=CAMERA, kind=FeatureKind.IMAGE, dtype="uint8", shape=(16, 16, 3)),
        Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(2,)),
    ),
    action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(2,)),),
    control_rate_hz=30.0,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy():
    tokenizer = pi_tokenizer()
    network = NetworkConfig(
        vision=VisionSize(width=16, depth=1, mlp=16, heads=2, patch=8),
        language=TowerSize(width=16, depth=2, mlp=16, heads=2, kv_heads=1, head_dim=8),
        expert=TowerSize(width=8, depth=2, mlp=16, heads=2, kv_heads=1, head_dim=8),
        vocabulary=tokenizer.vocabulary,
        image_height=16,
        image_width=16,
        action_size=4,
    )
    options = Pi052PromptOptions(recipe=recipes.load("subtask_joint"), prompt_length=96)
    chunks = np.random.default_rng(0).normal(size=(30, HORIZON, 2)).clip(-1.5, 1.5)
    prompter: Prompter = Pi052Prompter(tokenizer, options, fast.fit(chunks))
    torch.manual_seed(0)
    made = Pi052Policy(Pi052Config(network=network, horizon=HORIZON, prompt_length=96, flow_repeats=2), SPEC, prompter)
    made.set_statistics({name: {"q01": -np.ones(2), "q99": np.ones(2)} for name in ("observation.state", "action")})
    return made.eval()


def sample(*, subtask=True, train=True):
    rows = [{"role": "assistant", "content": "grasp the cup", "style": "subtask", "timestamp": 0.0}] if subtask else []
    state = np.array([0.5, -0.5], dtype=np.float32)
    return Sample(
        observation={CAMERA: np.zeros((16, 16, 3), dtype=np.uint8), "observation.state": state},
        task="tidy up",
        actions=np.full((HORIZON, 2), 0.3, dtype=np.float32) if train else None,
        annotations={"persistent": rows},
    )


def test_annotated_samples_train_every_term(policy):
    inputs = policy.preprocess([sample(), sample(subtask=False)], CPU)
    assert (inputs.labels[0] != IGNORED_LABEL).any()
    assert (inputs.labels[1] == IGNORED_LABEL).all()
    assert inputs.fast_is_code.any(dim=1).all()
    losses = policy.loss(inputs, torch.Generator().manual_seed(0))
    assert {name: bool(torch.isfinite(term).all()) for name, term in losses.terms.items()} == dict.fromkeys(
        ("flow", "text", "fast"), True
    )


def test_a_given_subtask_attends_alike_in_learning_and_acting_whatever_text_weighs():
    made = prompted_lab.policy("pi052", text_weight=0.0, prompts={"recipe": "subtask_joint", "joint": True})
    learnt = made.preprocess([prompted_lab.sample(train=True)], CPU)
    acted = made.preprocess([replace(prompted_lab.sample(), annotations={"subtask": "grasp the cup"})], CPU)
    assert torch.equal(learnt.tokens, acted.tokens)
    assert torch.equal(made.embed_prefix(learnt, fast=False).marks, made.embed_prefix(acted, fast=False).marks)
    assert "text" not in made.loss(learnt, torch.Generator().manual_seed(0)).terms


def test_it_acts_and_speaks(policy):
    inputs = policy.preprocess([sample(train=False)], CPU)
    assert policy.act(inputs, policy.draw_noise([1]), num_steps=2).shape == (1, HORIZON, 4)
    request = TextRequest(kind=TextKind.SUBTASK, max_new_tokens=5)
    assert isinstance("".join(policy.generate([sample(train=False)], request, CPU)), str)
