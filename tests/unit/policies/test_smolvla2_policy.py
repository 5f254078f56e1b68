"""SmolVLA2 behind the Policy interface, on a network of some ten thousand weights and prompts of bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from manyhands.errors import InvalidInput, NotOffered
from manyhands.spec import Feature, FeatureKind, Spec
from policies import checkpoint, losses
from policies.normalization import compute_statistics
from policies.policy import Sample, TextKind, TextRequest
from policies.smolvla2 import config as configs
from policies.smolvla2.policy import SmolVLA2Policy, SmolVLAPolicy

CPU = torch.device("cpu")
FRONT, WRIST, STATE = "observation.images.front", "observation.images.wrist", "observation.state"


def _spec(state_size: int = 3) -> Spec:
    return Spec(
        observation=(
            Feature(name=FRONT, kind=FeatureKind.IMAGE, dtype="uint8", shape=(16, 24, 3)),
            Feature(name=WRIST, kind=FeatureKind.IMAGE, dtype="uint8", shape=(16, 16, 3)),
            Feature(name=STATE, kind=FeatureKind.STATE, dtype="float32", shape=(state_size,)),
        ),
        action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(3,)),),
        control_rate_hz=30.0,
    )


def _policy(cls: type[SmolVLA2Policy] = SmolVLA2Policy, **changes: Any) -> SmolVLA2Policy:
    torch.manual_seed(0)
    policy = cls.from_config({**cls.tiny_config(), **changes}, _spec())
    rng = np.random.default_rng(0)
    policy.set_statistics({
        STATE: compute_statistics(rng.normal(2.0, 3.0, (50, 3))),
        "action": compute_statistics(rng.normal(-1.0, 0.5, (50, 3))),
    })  # fmt: skip
    return policy


def _sample(seed: int = 0, *, actions: bool = False, padded: int = 0, **observation: Any) -> Sample:
    rng = np.random.default_rng(seed)
    whole = {
        FRONT: rng.integers(0, 256, (16, 24, 3), dtype=np.uint8),
        WRIST: rng.integers(0, 256, (16, 16, 3), dtype=np.uint8),
        STATE: rng.normal(size=3).astype(np.float32),
    }
    return Sample(
        observation={**whole, **observation},
        task="open the drawer",
        actions=rng.normal(size=(8, 3)).astype(np.float32) if actions else None,
        is_pad=np.arange(8) >= 8 - padded if actions else None,
    )


def _act(policy: SmolVLA2Policy, sample: Sample) -> torch.Tensor:
    return policy.act(policy.preprocess([sample], CPU), policy.draw_noise([0]))


def test_the_state_reaches_actions_and_not_the_prompt() -> None:
    policy = _policy()
    sample, other = _sample(), _sample(**{STATE: np.array([5.0, -5.0, 1.0], dtype=np.float32)})
    assert torch.equal(policy.preprocess([sample], CPU).tokens, policy.preprocess([other], CPU).tokens)
    assert not torch.equal(_act(policy, sample), _act(policy, other))


def test_a_picture_that_fits_no_side_is_padded_left_and_top() -> None:
    policy = _policy()
    white = np.full((8, 16, 3), 255, dtype=np.uint8)
    pictures = policy.preprocess([_sample(**{FRONT: white})], CPU).pictures[0, 0]
    assert (pictures[:, :8] == -1.0).all()
    assert (pictures[:, 8:] == 1.0).all()


def test_an_absent_camera_is_as_if_it_were_not_in_the_network() -> None:
    """Whatever stands in its place: neither seen nor counted."""
    policy = _policy()
    inputs = policy.preprocess([_sample()], CPU)
    absent = replace(inputs, picture_valid=torch.tensor([[False, True]]))
    noise = policy.draw_noise([0])
    without = replace(absent, pictures=inputs.pictures[:, 1:], picture_valid=torch.tensor([[True]]))
    torch.testing.assert_close(policy.act(absent, noise), policy.act(without, noise))
    noisy = replace(absent, pictures=torch.cat([torch.rand(1, 1, 3, 16, 16), inputs.pictures[:, 1:]], dim=1))
    torch.testing.assert_close(policy.act(noisy, noise), policy.act(without, noise))


def test_every_camera_absent_is_an_error() -> None:
    sample = _sample()
    with pytest.raises(InvalidInput, match="lacks every camera"):
        _policy().preprocess([replace(sample, observation={STATE: sample.observation[STATE]})], CPU)


@pytest.mark.parametrize("cls", [SmolVLA2Policy, SmolVLAPolicy])
def test_steps_beyond_the_end_teach_nothing(cls: type[SmolVLA2Policy]) -> None:
    policy = _policy(cls)
    inputs = policy.preprocess([_sample(actions=True, padded=3)], CPU)
    assert inputs.actions is not None
    other = replace(inputs, actions=inputs.actions.clone())
    assert other.actions is not None
    other.actions[:, 7:] += 10.0  # The last: no earlier action sees it.
    values = [policy.loss(each, torch.Generator().manual_seed(0)).terms["flow"] for each in (inputs, other)]
    assert torch.equal(*values)


def test_padded_steps_dilute_in_smolvla2_alone() -> None:
    found = {}
    for dilute in (True, False):
        policy = _policy(padded_steps_dilute=dilute)
        inputs = policy.preprocess([_sample(actions=True, padded=3)], CPU)
        found[dilute] = float(policy.loss(inputs, torch.Generator().manual_seed(0)).terms["flow"].detach())
    assert found[True] == pytest.approx(found[False] * 5 / 8, rel=1e-5)


def test_a_flag_of_another_length_is_refused() -> None:
    sample = replace(_sample(actions=True), is_pad=np.zeros(7, dtype=np.bool_))
    with pytest.raises(InvalidInput, match="is_pad"):
        _policy().preprocess([sample], CPU)


def test_a_sample_that_predicts_no_actions_has_no_flow() -> None:
    policy = _policy()
    inputs = policy.preprocess([_sample(0, actions=True), _sample(1, actions=True)], CPU)
    found = policy.loss(replace(inputs, predicts=torch.tensor([False, True])), torch.Generator().manual_seed(0))
    assert found.terms["flow"][0] == 0
    assert found.terms["flow"][1] > 0
    assert (found.terms["text"] > 0).all()


def test_a_batch_without_targets_trains_the_same_modules() -> None:
    """Ranks wait for each other: no weight may miss its gradient because of what samples hold."""
    policy = _policy()
    inputs = policy.preprocess([_sample(actions=True)], CPU)
    assert inputs.labels is not None
    empty = replace(
        inputs, labels=torch.full_like(inputs.labels, losses.IGNORED_LABEL), predicts=torch.zeros(1, dtype=torch.bool)
    )
    found = policy.loss(empty, torch.Generator().manual_seed(0))
    assert float(found.total.detach()) == 0.0
    torch.autograd.backward(found.total)
    assert [name for name, p in policy.named_parameters() if p.requires_grad and p.grad is None] == []


def test_recomputed_layers_give_the_same_gradients() -> None:
    tiny = configs.dump(configs.TINY)["network"]
    found = []
    for recompute in (False, True):
        policy = _policy(network={**tiny, "gradient_checkpointing": recompute})
        inputs = policy.preprocess([_sample(actions=True)], CPU)
        torch.autograd.backward(policy.loss(inputs, torch.Generator().manual_seed(0)).total)
        found.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_text_is_the_same_for_the_same_seed_and_does_not_see_the_state() -> None:
    policy = _policy()
    request = TextRequest(kind=TextKind.SUBTASK, max_new_tokens=12, min_new_tokens=12, temperature=1.0, seed=3)
    texts = ["".join(policy.generate([_sample()], request, CPU)) for _ in range(2)]
    other_state = _sample(**{STATE: np.array([9.0, 9.0, 9.0], dtype=np.float32)})
    assert texts[0] == texts[1] == "".join(policy.generate([other_state], request, CPU))
    assert texts[0] != "".join(policy.generate([_sample()], replace(request, seed=4), CPU))


def test_smolvla_has_no_text() -> None:
    policy = _policy(SmolVLAPolicy)
    with pytest.raises(NotOffered):
        next(iter(policy.generate([_sample()], TextRequest(kind=TextKind.SUBTASK), CPU)))
    assert policy.preprocess([_sample(actions=True)], CPU).labels is None


def test_without_a_tokenizer_prepared_inputs_still_work() -> None:
    policy, bare = _policy(), _policy(byte_prompts=False)
    with pytest.raises(NotOffered, match="tokenizer"):
        bare.preprocess([_sample()], CPU)
    inputs, noise = policy.preprocess([_sample()], CPU), policy.draw_noise([0])
    checkpoint.load_tensors(bare, policy.state_dict())
    assert torch.equal(bare.act(inputs, noise), policy.act(inputs, noise))


def test_a_state_that_is_too_large_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"9 numbers of state, the model holds 8"):
        SmolVLA2Policy.from_config(SmolVLA2Policy.tiny_config(), _spec(state_size=9))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"train_expert_only": True}, "train_expert_only"),
        ({"network": {"image_height": 24}}, "image_height"),
        ({"network": {"shuffle": 3}}, "image_height"),
        ({"network": {"vision": {"heads": 5}}}, r"vision\.heads"),
        ({"network": {"expert": {"depth": 2}}}, r"expert\.depth"),
        ({"network": {"expert": {"head_dim": 7}, "language": {"head_dim": 7}}}, r"language\.head_dim: is 7, must be even"),
        ({"network": {"expert": {"width": 15}}}, r"expert\.width: is 15, must be even"),
        (
            {"network": {"expert": {"kv_heads": 3}, "language": {"kv_heads": 3}}},
            r"language\.heads: is 4, must be a multiple",
        ),
        ({"network": {"self_attention_every": -1}}, "self_attention_every"),
        ({"num_steps": 0}, "num_steps"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    def merged(base: Any, over: Any) -> Any:
        return {**base, **{k: merged(base[k], v) for k, v in over.items()}} if isinstance(over, dict) else over

    with pytest.raises(InvalidInput, match=field):
        SmolVLA2Policy.from_config(merged(dict(SmolVLA2Policy.tiny_config()), change), _spec())
