"""pi052 against the golden fixtures: rows 2, 4 and 6 to 9 of the parity table, and what must hold whatever the weights."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from policies import losses, rows, text
from policies.pi052 import checkpoint_keys
from policies.pi052 import model as pi052_model
from policies.pi052.policy import Pi052Inputs, Pi052Policy

from . import pi
from .golden import Golden, folder, relative_error

LOSS_CASES = ["K1_ki1", "K1_ki0", "K5_ki1", "K5_ki0", "K1_flow_only", "K5_flow_only", "text_only"]
GRADIENT_CASES = ["K1_ki1", "K1_ki0", "K5_ki1", "K5_ki0"]


def _policy(golden: Golden, case: str) -> Pi052Policy:
    return pi.build(golden, **pi.case_settings(golden, case))


def test_prefix_with_causal_targets_and_fast_tokens(pi052: Pi052Policy, pi052_golden: Golden) -> None:
    errors = pi.measure_prefix(pi052, pi052_golden)
    assert max(errors.values()) <= pi.AIM, errors


@pytest.mark.parametrize("case", LOSS_CASES)
def test_losses(pi052_golden: Golden, case: str) -> None:
    errors = pi.measure_losses(_policy(pi052_golden, case), pi052_golden, case)
    assert "total" in errors
    assert max(errors.values()) <= pi.LOSS_AIM, errors


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients(pi052_golden: Golden, case: str) -> None:
    errors = pi.measure_gradients(_policy(pi052_golden, case), pi052_golden, case)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= pi.GRADIENT_LIMIT, (worst, errors[worst])


@pytest.mark.parametrize("case", ["K1_flow_only", "K5_flow_only"])
def test_insulation_keeps_the_flow_loss_alone_from_the_language_model(pi052_golden: Golden, case: str) -> None:
    for name, gradient in pi.gradients(_policy(pi052_golden, case), pi052_golden, case).items():
        if pi.is_language_model(name):
            assert gradient is None or not gradient.any(), name


def test_without_insulation_the_flow_loss_trains_the_language_model(pi052_golden: Golden) -> None:
    case = "K5_flow_only_noki"
    gradients = pi.gradients(_policy(pi052_golden, case), pi052_golden, case)
    norms = [float(g.double().norm()) for name, g in gradients.items() if g is not None and pi.is_language_model(name)]
    expected = pi052_golden.meta["cases"][case]["vlm_gradient_norm"]
    assert torch.tensor(norms).norm().item() == pytest.approx(expected, rel=pi.GRADIENT_LIMIT)


def test_insulation_holds_while_text_and_fast_train_too(pi052: Pi052Policy, pi052_golden: Golden) -> None:
    """The flow term of a batch with all terms, and the whole graph kept."""
    pi052.zero_grad(set_to_none=True)
    found = pi052.loss_of(pi.inputs_of(pi052_golden), pi.draws_of(pi052_golden, 5))
    torch.autograd.backward(found.terms["flow"].sum())
    seen = {checkpoint_keys.to_lerobot(n): p.grad for n, p in pi052.network.named_parameters() if p.grad is not None}
    pi052.zero_grad(set_to_none=True)
    assert any("gemma_expert" in name for name in seen)
    assert not [name for name, gradient in seen.items() if pi.is_language_model(name) and gradient.any()]


def test_insulation_does_not_change_the_forward(pi052_golden: Golden) -> None:
    inputs, draws = pi.inputs_of(pi052_golden), pi.draws_of(pi052_golden, 5)
    with torch.no_grad():
        on, off = (pi.build(pi052_golden, knowledge_insulation=ki).loss_of(inputs, draws).total for ki in (True, False))
    assert torch.equal(on, off)


def test_repeats_do_not_see_each_other(pi052: Pi052Policy, pi052_golden: Golden) -> None:
    """Five repeats in one pass are five passes."""
    inputs, draws = pi.inputs_of(pi052_golden), pi.draws_of(pi052_golden, 5)
    assert inputs.actions is not None
    rows = inputs.tokens.shape[0]
    with torch.no_grad():
        state = pi052.prefix_state(inputs, hidden=False, fast=True)
        x = draws.noise.view(5, rows, *draws.noise.shape[1:]).transpose(0, 1)
        time = draws.time.view(5, rows).transpose(0, 1)
        together = pi052.network.expert_step(state, x, time)
        for k in range(5):
            alone = pi052.network.expert_step(state, x[:, k : k + 1], time[:, k : k + 1])
            assert relative_error(together[:, k], alone[:, 0]) <= pi.AIM


def test_gradient_checkpointing_changes_nothing(pi052_golden: Golden) -> None:
    inputs, draws = pi.inputs_of(pi052_golden), pi.draws_of(pi052_golden, 1)
    gradients = []
    for checkpointing in (False, True):
        policy = pi.build(pi052_golden, network_gradient_checkpointing=checkpointing)
        torch.autograd.backward(policy.loss_of(inputs, draws).total)
        grads = [p.grad for p in policy.network.language.parameters()]
        gradients.append([g for g in grads if g is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nothing_to_learn_is_an_error(pi052: Pi052Policy, pi052_golden: Golden) -> None:
    with pytest.raises(ValueError, match="nothing to learn"):
        pi052.loss_of(pi.acting(pi.inputs_of(pi052_golden)), pi.draws_of(pi052_golden, 5))


def test_chunks_with_and_without_a_given_subtask(pi052: Pi052Policy, pi052_golden: Golden) -> None:
    errors = pi.measure_joint_chunks(pi052, pi052_golden)
    assert max(errors.values()) <= pi.AIM, errors


# -- what no number of a fixture shows ---------------------------------------------------------------------------------


def _text_logits(policy: Pi052Policy, inputs: Pi052Inputs) -> torch.Tensor:
    """(B, L, V)."""
    assert inputs.fast_tokens is not None
    state = policy.prefix_state(inputs, hidden=True, fast=True)
    assert state.hidden is not None
    num_fast, num_text = inputs.fast_tokens.shape[1], inputs.tokens.shape[1]
    return policy.network.text_logits(state.hidden[:, -num_fast - num_text : -num_fast])


@torch.no_grad()
def test_a_target_token_changes_no_logit_before_it(pi052: Pi052Policy, pi052_golden: Golden) -> None:
    inputs = pi.inputs_of(pi052_golden)
    assert inputs.labels is not None
    before = _text_logits(pi052, inputs)
    checked = 0
    for row, position in (inputs.labels != losses.IGNORED_LABEL).nonzero().tolist():
        tokens = inputs.tokens.clone()
        tokens[row, position] = (tokens[row, position] + 4321) % 250_000
        after = _text_logits(pi052, replace(inputs, tokens=tokens))
        assert torch.equal(after[row, :position], before[row, :position])
        assert not torch.equal(after[row, position], before[row, position]), "its own position must see it"
        checked += 1
    assert checked


@torch.no_grad()
def test_fast_tokens_change_neither_actions_nor_text(pi052: Pi052Policy, pi052_golden: Golden) -> None:
    inputs, draws = pi.inputs_of(pi052_golden), pi.draws_of(pi052_golden, 1)
    assert inputs.fast_tokens is not None
    x, time = draws.noise[:, None], draws.time[:, None]

    def outputs(given: Pi052Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        state = pi052.prefix_state(given, hidden=True, fast=True)
        # Padding looks at everything alike, and nothing looks at padding.
        return pi052.network.expert_step(state, x, time), _text_logits(pi052, given)[given.token_valid]

    velocity, logits = outputs(inputs)
    for position in range(inputs.fast_tokens.shape[1]):
        tokens = inputs.fast_tokens.clone()
        tokens[:, position] = (tokens[:, position] + 1234) % 250_000
        changed_velocity, changed_logits = outputs(replace(inputs, fast_tokens=tokens))
        assert torch.equal(changed_velocity, velocity)
        assert torch.equal(changed_logits, logits)
    # Nor does it matter to actions that FAST is there at all: it is not, when the robot acts.
    without = pi052.network.expert_step(pi052.prefix_state(inputs, hidden=False), x, time)
    assert relative_error(without, velocity) <= pi.AIM


@torch.no_grad()
def test_padding_does_not_matter(pi052: Pi052Policy, pi052_golden: Golden) -> None:
    """A prompt padded by forty more tokens, and filled with other ids there, gives the same chunk."""
    inputs = pi.acting(pi.inputs_of(pi052_golden))
    noise = pi052_golden["in.noise"][: inputs.tokens.shape[0]]
    expected = pi052.act(inputs, noise, num_steps=4)
    padded = replace(
        inputs,
        tokens=torch.nn.functional.pad(inputs.tokens, (0, 40), value=77),
        token_valid=torch.nn.functional.pad(inputs.token_valid, (0, 40)),
    )
    assert relative_error(pi052.act(padded, noise, num_steps=4), expected) <= pi.AIM


def test_learning_rate_groups(pi052_golden: Golden) -> None:
    wanted = json.loads((folder() / "misc.json").read_text())["lr_groups"]
    scales = wanted["scales"]
    policy = pi.build(
        pi052_golden,
        head_lr_scale=scales["lm_head_lr_scale"],
        backbone_lr_scale=scales["backbone_lr_scale"],
        expert_lr_scale=scales["action_expert_lr_scale"],
    )
    names = {id(p): checkpoint_keys.to_lerobot(name) for name, p in policy.network.named_parameters()}
    groups = {group.name: group for group in policy.parameter_groups()}
    assert list(groups) == [group["name"] for group in wanted["groups"]]
    for group in wanted["groups"]:
        found = groups[group["name"]]
        # The expert's head computes nothing and does not train here.
        expected = {name for name in group["params"] if "gemma_expert.lm_head" not in name}
        assert {names[id(p)] for p in found.parameters} == expected
        assert found.lr_scale * wanted["optimizer_lr"] == pytest.approx(group["lr"], rel=1e-9)


# -- text --------------------------------------------------------------------------------------------------------------


def test_greedy_ids(pi052: Pi052Policy, pi052_golden: Golden) -> None:
    errors = pi.measure_text(pi052, pi052_golden)
    assert len(errors) == len(pi052_golden.meta["select"])
    assert not any(errors.values()), errors


@torch.no_grad()
def _recomputed_ids(policy: Pi052Policy, prompt: Pi052Inputs, rules: text.Decoding) -> list[int]:
    """Greedy ids without a cache: the whole sequence again for every token, each generated one a block of its own."""
    generated: list[int] = []
    prompt_length = prompt.tokens.shape[1]
    while len(generated) < rules.max_new_tokens:
        tokens = torch.cat([prompt.tokens, torch.tensor([generated], dtype=torch.int64)], dim=1)
        marks = torch.arange(tokens.shape[1])[None, :] >= prompt_length
        whole = replace(prompt, tokens=tokens, token_valid=torch.ones_like(marks), token_marks=marks)
        state = policy.prefix_state(whole, hidden=True)
        assert state.hidden is not None
        logits = text.allowed_logits(policy.network.text_logits(state.hidden[:, -1]), rules, len(generated))
        generated.append(int(logits.argmax()))
        if generated[-1] == rules.end_token:
            break
    return generated


def test_ids_without_a_cache_are_the_same(pi052: Pi052Policy, pi052_golden: Golden) -> None:
    for case in pi052_golden.meta["select"]:
        ids = _recomputed_ids(pi052, pi.prompt_of(pi052_golden, case["tokens"]), pi.rules_of(pi052_golden, case))
        assert ids == case["ids"]


def _one_batch(prompts: list[Pi052Inputs]) -> Pi052Inputs:
    """Prompts of any length, padded on the right."""
    longest = max(prompt.tokens.shape[1] for prompt in prompts)

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, longest - tensor.shape[1]))

    return rows.join([replace(p, tokens=padded(p.tokens), token_valid=padded(p.token_valid)) for p in prompts])


def _shortened(prompt: Pi052Inputs, by: int) -> Pi052Inputs:
    return replace(prompt, tokens=prompt.tokens[:, :-by], token_valid=prompt.token_valid[:, :-by])


@torch.no_grad()
def test_padded_rows_decode_as_if_alone(pi052: Pi052Policy, pi052_golden: Golden) -> None:
    """Prompts of different lengths in one batch, one of which ends early."""
    case = pi052_golden.meta["select"][0]
    prompt = pi.prompt_of(pi052_golden, case["tokens"])
    prompts = [prompt, _shortened(prompt, 1), _shortened(prompt, 3)]
    rules = replace(pi.rules_of(pi052_golden, case), end_token=case["ids"][2], special_tokens=())

    def decode(inputs: Pi052Inputs) -> list[list[int]]:
        return text.generate_ids(pi052.network, pi052.prefix_state(inputs, hidden=True), rules)

    alone = [decode(prompt)[0] for prompt in prompts]
    assert alone[0] == case["ids"][:3]
    assert len({len(ids) for ids in alone}) > 1, "all rows ended together: nothing was tried"
    assert decode(_one_batch(prompts)) == alone


@torch.no_grad()
def test_actions_may_follow_generated_text(pi052: Pi052Policy, pi052_golden: Golden) -> None:
    """Joint mode in one pass: the cache after decoding is the prefix with the subtask given and causal."""
    case = pi052_golden.meta["select"][0]
    prompt = pi.prompt_of(pi052_golden, case["tokens"])
    ids = torch.tensor([case["ids"][:3]])
    decoded = pi052.prefix_state(prompt, hidden=True)
    for index in range(ids.shape[1]):
        _, decoded = pi052.network.text_step(decoded, ids[:, index])
    tokens = torch.cat([prompt.tokens, ids], dim=1)
    marks = torch.arange(tokens.shape[1])[None, :] >= prompt.tokens.shape[1]
    given = pi052.prefix_state(
        replace(prompt, tokens=tokens, token_valid=torch.ones_like(marks), token_marks=marks), hidden=False
    )
    noise, time = pi052_golden["in.noise"][:1, None], torch.tensor([[0.7]])
    velocity, expected = (pi052.network.expert_step(state, noise, time) for state in (decoded, given))
    assert relative_error(velocity, expected) <= pi.AIM


def test_logits_of_a_cached_step_are_those_of_the_whole(pi052: Pi052Policy, pi052_golden: Golden) -> None:
    case = pi052_golden.meta["select"][0]
    prompt = pi.prompt_of(pi052_golden, case["tokens"])
    ids = torch.tensor([case["ids"][:4]])
    with torch.no_grad():
        state: pi052_model.PrefixState = pi052.prefix_state(prompt, hidden=True)
        for index in range(4):
            cached, state = pi052.network.text_step(state, ids[:, index])
        tokens = torch.cat([prompt.tokens, ids], dim=1)
        marks = torch.arange(tokens.shape[1])[None, :] >= prompt.tokens.shape[1]
        whole = pi052.prefix_state(
            replace(prompt, tokens=tokens, token_valid=torch.ones_like(marks), token_marks=marks), hidden=True
        )
        assert whole.hidden is not None
        assert relative_error(cached, pi052.network.text_logits(whole.hidden[:, -1])) <= pi.AIM
