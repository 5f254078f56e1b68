"""SmolVLA2 against the golden fixtures: row 12 of the parity table; row 15, bfloat16 against our own float32."""

from __future__ import annotations

import torch

from policies import losses, text
from policies.configuration import Precision
from policies.smolvla2.policy import SmolVLA2Policy

from . import smol
from .golden import Golden, relative_error

BFLOAT16_LIMIT = 1e-2


def test_prefix(smolvla2: SmolVLA2Policy, smolvla2_golden: Golden) -> None:
    errors = smol.measure_prefix(smolvla2, smolvla2_golden)
    assert max(errors.values()) <= smol.AIM, errors


def test_chunks(smolvla2: SmolVLA2Policy, smolvla2_golden: Golden) -> None:
    errors = smol.measure_chunks(smolvla2, smolvla2_golden)
    assert "chunk.4" in errors
    assert max(errors.values()) <= smol.AIM, errors


def test_losses(smolvla2: SmolVLA2Policy, smolvla2_golden: Golden) -> None:
    assert {"time0", "time1", "text_only", "no_pad", "flow_only"} <= smolvla2_golden.meta["cases"].keys()
    for case in smolvla2_golden.meta["cases"]:
        errors = smol.measure_losses(smolvla2, smolvla2_golden, case)
        assert max(errors.values()) <= smol.LOSS_AIM, (case, errors)


def test_gradients(smolvla2: SmolVLA2Policy, smolvla2_golden: Golden) -> None:
    for case in smolvla2_golden.meta["grads"]:
        errors = smol.measure_gradients(smolvla2, smolvla2_golden, case)
        assert max(errors.values()) <= smol.GRADIENT_LIMIT, max(errors, key=lambda name: errors[name])


def test_what_does_not_train(smolvla2: SmolVLA2Policy, smolvla2_golden: Golden) -> None:
    assert smol.frozen_names(smolvla2) == set(smolvla2_golden.meta["frozen"])


def test_generated_ids(smolvla2: SmolVLA2Policy, smolvla2_golden: Golden) -> None:
    errors = smol.measure_text(smolvla2, smolvla2_golden)
    assert errors
    assert max(errors.values()) == 0, errors


@torch.no_grad()
def test_generated_ids_without_a_cache(smolvla2: SmolVLA2Policy, smolvla2_golden: Golden) -> None:
    """As the reference does it: the whole prefix again for every token, the new ones marked."""
    golden = smolvla2_golden
    case = golden.meta["select"][0]
    inputs = smol.prompt_of(golden, case["tokens"])
    count = inputs.tokens.shape[1]
    network = smolvla2.network
    for expected in case["ids"]:
        length = inputs.tokens.shape[1]
        marks = (torch.arange(length) >= count)[None]
        pictures = network.encode_pictures(inputs.pictures)
        valid = torch.ones_like(inputs.tokens, dtype=torch.bool)
        prefix = network.embed_prefix(pictures, inputs.picture_valid, inputs.tokens, valid, None, token_marks=marks)
        hidden = network.run_prefix(prefix, hidden=True).hidden
        assert hidden is not None
        found = network.text_logits(hidden[:, -1]).argmax(dim=-1)
        assert found.tolist() == [expected]
        inputs = smol.replace(inputs, tokens=torch.cat([inputs.tokens, found[:, None]], dim=1))


@torch.no_grad()
def test_a_padded_prompt_gives_the_same_ids(smolvla2: SmolVLA2Policy, smolvla2_golden: Golden) -> None:
    golden = smolvla2_golden
    case = golden.meta["select"][0]
    inputs = smol.prompt_of(golden, case["tokens"])
    padded = smol.replace(
        inputs,
        tokens=torch.nn.functional.pad(inputs.tokens, (0, 4)),
        token_valid=torch.nn.functional.pad(inputs.token_valid, (0, 4)),
    )
    assert text.generate_ids(smolvla2.network, smolvla2.text_state(padded), smol.rules_of(case))[0] == case["ids"]


@torch.no_grad()
def test_a_target_does_not_reach_the_logits_before_it(smolvla2: SmolVLA2Policy, smolvla2_golden: Golden) -> None:
    inputs = smol.inputs_of(smolvla2_golden)
    assert inputs.labels is not None
    row = int((inputs.labels != losses.IGNORED_LABEL).any(dim=1).nonzero()[0])
    last = int((inputs.labels[row] != losses.IGNORED_LABEL).nonzero()[-1])
    changed = smol.replace(inputs, tokens=inputs.tokens.clone())
    changed.tokens[row, last] += 1
    hidden = []
    for each in (inputs, changed):
        prefix = smolvla2.embed_prefix(each, each.state)
        state = smolvla2.network.run_prefix(prefix, hidden=True)
        assert state.hidden is not None
        hidden.append(state.hidden[row, : prefix.language.start + last])
    assert torch.equal(hidden[0], hidden[1])


# -- bfloat16 ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_bfloat16(smolvla2: SmolVLA2Policy, smolvla2_golden: Golden) -> None:
    golden = smolvla2_golden
    half = smol.build(golden, network_precision=Precision.BFLOAT16)
    inputs = smol.inputs_of(golden)
    exact, rounded = (p.loss_terms(inputs, golden["in.noise"], golden["in.time"][0]) for p in (smolvla2, half))
    assert exact.keys() == rounded.keys() == {"flow", "text"}
    for name, term in rounded.items():
        assert term.mean.dtype == torch.float32
        assert 0 < relative_error(term.per_sample, exact[name].per_sample) <= BFLOAT16_LIMIT
    chunks = [p.act(smol.acting(inputs), golden["in.noise"], num_steps=4) for p in (smolvla2, half)]
    assert chunks[1].dtype == torch.float32
    assert 0 < relative_error(chunks[1], chunks[0]) <= BFLOAT16_LIMIT
    case = golden.meta["select"][0]
    ids = text.generate_ids(half.network, half.text_state(smol.prompt_of(golden, case["tokens"])), smol.rules_of(case))
    assert len(ids[0]) == case["max_new_tokens"]
