"""bfloat16 against our own float32: row 15 of the parity table."""

from __future__ import annotations

import pytest
import torch

from policies import text
from policies.pi052.config import Precision
from policies.pi052.policy import Pi052Policy

from . import pi
from .golden import Golden, relative_error

LIMIT = 1e-2


@pytest.fixture(scope="module")
def half(pi052_golden: Golden) -> Pi052Policy:
    return pi.build(pi052_golden, network_precision=Precision.BFLOAT16)


@torch.no_grad()
def test_velocity_and_chunk(half: Pi052Policy, pi052: Pi052Policy, pi052_golden: Golden) -> None:
    inputs = pi.acting(pi.inputs_of(pi052_golden))
    noise = pi052_golden["in.noise"][: inputs.tokens.shape[0]]
    time = pi052_golden["in.time"][: noise.shape[0], None]
    whole, small = (policy.prefix_state(inputs, hidden=True) for policy in (pi052, half))
    exact = pi052.network.expert_step(whole, noise[:, None], time)
    rounded = half.network.expert_step(small, noise[:, None], time)
    assert rounded.dtype == torch.float32
    assert 0 < relative_error(rounded, exact) <= LIMIT
    assert 0 < relative_error(half.act(inputs, noise), pi052.act(inputs, noise)) <= LIMIT


@torch.no_grad()
def test_losses(half: Pi052Policy, pi052: Pi052Policy, pi052_golden: Golden) -> None:
    inputs, draws = pi.inputs_of(pi052_golden), pi.draws_of(pi052_golden, 5)
    exact, rounded = (policy.loss_terms(inputs, draws) for policy in (pi052, half))
    assert exact.keys() == rounded.keys() == {"flow", "text", "fast"}
    for name, term in rounded.items():
        assert term.mean.dtype == torch.float32
        assert relative_error(term.per_sample, exact[name].per_sample) <= LIMIT


@torch.no_grad()
def test_first_logits(half: Pi052Policy, pi052: Pi052Policy, pi052_golden: Golden) -> None:
    case = pi052_golden.meta["select"][0]
    prompt = pi.prompt_of(pi052_golden, case["tokens"])
    states = [policy.prefix_state(prompt, hidden=True) for policy in (pi052, half)]
    assert states[0].hidden is not None
    assert states[1].hidden is not None
    exact = pi052.network.text_logits(states[0].hidden[:, -1])
    assert 0 < relative_error(half.network.text_logits(states[1].hidden[:, -1]), exact) <= LIMIT
    ids = text.generate_ids(half.network, states[1], pi.rules_of(pi052_golden, case))[0]
    assert len(ids) == case["max_new_tokens"]


def test_gradients_are_finite_and_in_the_weights_precision(half: Pi052Policy, pi052_golden: Golden) -> None:
    half.zero_grad(set_to_none=True)
    torch.autograd.backward(half.loss_of(pi.inputs_of(pi052_golden), pi.draws_of(pi052_golden, 5)).total)
    grads = {name: p.grad for name, p in half.network.named_parameters() if p.requires_grad}
    half.zero_grad(set_to_none=True)
    for name, gradient in grads.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
