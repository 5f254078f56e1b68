"""What every policy of the registry promises, whatever is inside. docs/guide/add-a-policy.md runs it on its example."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from manyhands.errors import InvalidInput, NotOffered
from manyhands.spec import Feature, FeatureKind, Spec
from policies import checkpoint, registry, rows
from policies.normalization import compute_statistics
from policies.policy import CommittedPrefix, Sample, TextKind, TextRequest

CPU = torch.device("cpu")
STATE, FRONT, WRIST, ACTION = "observation.state", "observation.images.front", "observation.images.wrist", "action"
SPEC = Spec(
    observation=(
        Feature(name=STATE, kind=FeatureKind.STATE, dtype="float32", shape=(6,)),
        Feature(name=FRONT, kind=FeatureKind.IMAGE, dtype="uint8", shape=(48, 64, 3)),
        Feature(name=WRIST, kind=FeatureKind.IMAGE, dtype="uint8", shape=(32, 32, 3)),
    ),
    action=(Feature(name=ACTION, kind=FeatureKind.ACTION, dtype="float32", shape=(3,)),),
    control_rate_hz=20.0,
)
TASKS = ("open the drawer", "press the button", "reach")


@pytest.fixture(params=sorted(registry.POLICIES))
def policy(request):
    torch.manual_seed(0)
    cls = registry.policy_class(request.param)
    built = cls.from_config(cls.tiny_config(), SPEC)
    rng = np.random.default_rng(0)
    built.set_statistics({
        STATE: compute_statistics(rng.normal(2.0, 3.0, (200, 6))),
        ACTION: compute_statistics(rng.normal(-1.0, 0.5, (200, 3))),
    })  # fmt: skip
    return built


def make_samples(policy, count, *, seed=0, training=False):
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        observation = {
            STATE: rng.normal(2.0, 3.0, 6).astype(np.float32),
            FRONT: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8),
            WRIST: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
        }
        actions = is_pad = None
        if training:
            actions = rng.normal(-1.0, 0.5, (policy.horizon, 3)).astype(np.float32)
            is_pad = np.arange(policy.horizon) >= policy.horizon - index % 2
        samples.append(Sample(observation=observation, task=TASKS[index % 3], actions=actions, is_pad=is_pad, index=index))
    return samples


def act(policy, samples, *, seeds=None, committed=None, num_steps=None):
    policy.eval()
    inputs = policy.preprocess(samples, CPU)
    noise = policy.draw_noise(seeds if seeds is not None else range(len(samples)))
    chunk = policy.act(inputs, noise, committed, num_steps)
    return chunk, policy.postprocess(chunk, inputs), inputs


def test_configuration_survives_a_round_trip(policy):
    again = type(policy).from_config(policy.config_dict(), SPEC)
    assert again.config_dict() == policy.config_dict()
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in policy.state_dict().items()}


def test_an_unknown_key_is_refused_by_name(policy):
    with pytest.raises(InvalidInput, match="no_such_knob"):
        type(policy).from_config({**policy.config_dict(), "no_such_knob": 1}, SPEC)


def test_what_it_reads_is_in_the_spec(policy):
    names = {feature.name for feature in SPEC.observation}
    assert policy.used_observations() <= names
    assert policy.used_observations()


def test_a_chunk_is_finite_and_of_the_promised_shape(policy):
    chunk, actions, _ = act(policy, make_samples(policy, 3))
    assert chunk.shape == (3, policy.horizon, policy.model_action_size)
    assert chunk.dtype == torch.float32
    assert actions.shape == (3, policy.horizon, 3)
    assert actions.dtype == np.float32
    assert np.isfinite(actions).all()


def test_the_same_request_gives_the_same_bits(policy):
    samples = make_samples(policy, 2)
    assert torch.equal(act(policy, samples)[0], act(policy, samples)[0])


def test_another_seed_or_another_task_gives_another_chunk(policy):
    samples = make_samples(policy, 1)
    other = [dataclasses.replace(samples[0], task="close the window")]
    chunk = act(policy, samples)[0]
    assert not torch.equal(chunk, act(policy, samples, seeds=[7])[0])
    assert not torch.equal(chunk, act(policy, other)[0])


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_a_row_does_not_know_its_neighbours(policy, count):
    """Bit for bit: a robot's chunk must not depend on who else is served in the same batch, nor on where it sits."""
    samples = make_samples(policy, count)
    together = act(policy, samples)[0]
    backwards = act(policy, samples[::-1], seeds=list(range(count))[::-1])[0]
    for row in range(count):
        assert torch.equal(act(policy, [samples[row]], seeds=[row])[0][0], together[row])
        assert torch.equal(backwards[count - 1 - row], together[row])


def test_a_missing_number_is_named(policy):
    sample = make_samples(policy, 1)[0]
    lacking = {name: value for name, value in sample.observation.items() if name != STATE}
    with pytest.raises(InvalidInput, match=STATE):
        policy.preprocess([dataclasses.replace(sample, observation=lacking)], CPU)


def test_a_number_that_is_not_finite_is_named(policy):
    sample = make_samples(policy, 1)[0]
    bad = sample.observation[STATE].copy()
    bad[2] = np.nan
    with pytest.raises(InvalidInput, match=STATE):
        policy.preprocess([dataclasses.replace(sample, observation={**sample.observation, STATE: bad})], CPU)


def test_a_missing_camera_is_masked_or_refused_as_declared(policy):
    sample = make_samples(policy, 1)[0]
    lacking = [dataclasses.replace(sample, observation={name: sample.observation[name] for name in (STATE, WRIST)})]
    if policy.masks_missing_cameras or FRONT not in policy.used_observations():
        assert torch.isfinite(act(policy, lacking)[0]).all()
    else:
        with pytest.raises(InvalidInput, match=FRONT):
            policy.preprocess(lacking, CPU)


def make_prefix(policy, carried, lengths, delays, horizons):
    actions = carried.clone()
    for row, length in enumerate(lengths):
        actions[row, length:] = 0.0
    return CommittedPrefix(
        actions=actions,
        length=torch.tensor(lengths),
        delay_steps=torch.tensor(delays),
        execution_horizon=torch.tensor(horizons),
    )


def test_a_row_without_a_prefix_is_as_if_none_were_given(policy):
    samples = make_samples(policy, 2)
    chunk, _, inputs = act(policy, samples)
    committed = make_prefix(policy, policy.carried(chunk, inputs), [0, policy.horizon], [2, 2], [6, 6])
    assert torch.equal(
        act(policy, samples, seeds=[5, 6], committed=committed)[0][0], act(policy, samples, seeds=[5, 6])[0][0]
    )


def test_a_prefix_pulls_the_steps_that_will_have_been_executed(policy):
    samples = make_samples(policy, 2)
    chunk, _, inputs = act(policy, samples, seeds=[1, 2])
    length = policy.horizon - 1
    committed = make_prefix(policy, policy.carried(chunk, inputs), [length, length], [3, 3], [6, 6])
    free = act(policy, samples, seeds=[11, 12])[0]
    guided = act(policy, samples, seeds=[11, 12], committed=committed)[0]
    # What a model pads the robot's numbers with is nobody's.
    free, guided, chunk = (values[:, :3, :3] for values in (free, guided, chunk))
    assert (guided - chunk).abs().mean() < 0.2 * (free - chunk).abs().mean()


def test_a_rows_prefix_does_not_touch_its_neighbour(policy):
    samples = make_samples(policy, 2)
    chunk, _, inputs = act(policy, samples)
    carried = policy.carried(chunk, inputs)
    one = make_prefix(policy, carried, [4, 4], [1, 1], [4, 4])
    other = make_prefix(policy, carried * 3.0, [4, 6], [1, 3], [4, 6])
    other.actions[0] = one.actions[0]
    first = act(policy, samples, seeds=[3, 4], committed=one)[0]
    second = act(policy, samples, seeds=[3, 4], committed=other)[0]
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_statistics_belong_to_the_weights(policy):
    torch.manual_seed(1)
    fresh = type(policy).from_config(policy.config_dict(), SPEC)
    checkpoint.load_tensors(fresh, dict(policy.state_dict()))
    samples = make_samples(policy, 2)
    np.testing.assert_array_equal(act(fresh, samples)[1], act(policy, samples)[1])


def test_disk_and_wire_keep_every_bit(policy, tmp_path):
    samples = make_samples(policy, 2)
    expected = act(policy, samples)[0]
    checkpoint.save(policy, tmp_path / "saved")
    assert torch.equal(act(checkpoint.load(tmp_path / "saved"), samples)[0], expected)
    fresh = type(policy).from_config(policy.config_dict(), SPEC)
    checkpoint.load_tensors(fresh, checkpoint.from_wire(checkpoint.to_wire(policy.state_dict())))
    assert torch.equal(act(fresh, samples)[0], expected)


def test_the_loss_is_a_function_of_inputs_and_generator(policy):
    inputs = policy.preprocess(make_samples(policy, 4, training=True), CPU)
    values = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        losses = policy.loss(inputs, torch.Generator().manual_seed(seed))
        assert losses.total.ndim == 0
        assert all(term.shape == (4,) for term in losses.terms.values())
        values.append(float(losses.total.detach()))
    assert values[0] == values[1] != values[2]


def test_every_trainable_parameter_is_in_one_group_and_learns(policy):
    groups = policy.parameter_groups()
    listed = [id(parameter) for group in groups for parameter in group.parameters]
    trainable = {id(p): name for name, p in policy.named_parameters() if p.requires_grad}
    assert sorted(listed) == sorted(trainable)
    inputs = policy.preprocess(make_samples(policy, 8, training=True), CPU)
    before = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [{"params": list(g.parameters), "lr": 1e-3 * g.lr_scale} for g in groups], weight_decay=0.0
    )
    losses = []
    for step in range(60):
        losses.append(policy(inputs, torch.Generator().manual_seed(step % 2)).total)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert float(losses[-1].detach()) < 0.9 * float(losses[1].detach())
    still = [name for name, p in policy.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert still == []


def test_samples_without_actions_cannot_be_trained_on(policy):
    inputs = policy.preprocess(make_samples(policy, 2), CPU)
    with pytest.raises(InvalidInput, match="actions"):
        policy.loss(inputs, torch.Generator())


def test_rows_of_inputs_can_be_picked_and_joined(policy):
    samples = make_samples(policy, 4, training=True)
    inputs = policy.preprocess(samples, CPU)
    assert rows.count(inputs) == 4
    picked = rows.join([rows.select(inputs, torch.tensor([2, 0])), rows.select(inputs, slice(3, 4))])
    direct = policy.preprocess([samples[2], samples[0], samples[3]], CPU)
    for field in dataclasses.fields(direct):
        expected, got = getattr(direct, field.name), getattr(picked, field.name)
        assert (expected is None and got is None) or torch.equal(expected, got), field.name


def test_text_is_offered_or_refused_as_declared(policy):
    request = TextRequest(kind=TextKind.SUBTASK, max_new_tokens=2)
    if policy.has_text_head:
        assert all(isinstance(piece, str) for piece in policy.generate(make_samples(policy, 1), request, CPU))
    else:
        with pytest.raises(NotOffered):
            next(iter(policy.generate(make_samples(policy, 1), request, CPU)))
