"""pi052 behind the Policy interface, on a network of a few thousand weights and a tokenizer that counts letters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from manyhands.errors import InvalidInput, NotOffered
from manyhands.spec import Feature, FeatureKind, Spec
from policies import losses, registry, rows, text
from policies.pi052 import config as configs
from policies.pi052.config import ChunkMode, NetworkConfig, Pi052Config, TowerSize, VisionSize
from policies.pi052.gemma import AdaptiveRmsNorm
from policies.pi052.policy import Pi05Policy, Pi052Policy
from policies.policy import CommittedPrefix, Sample, TextKind, TextRequest
from policies.prompt import Prompt

CPU = torch.device("cpu")
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
SPEC = Spec(
    observation=(
        Feature(name=FRONT, kind=FeatureKind.IMAGE, dtype="uint8", shape=(16, 24, 3)),
        Feature(name=WRIST, kind=FeatureKind.IMAGE, dtype="uint8", shape=(16, 16, 3)),
        Feature(
            name="observation.state",
            kind=FeatureKind.STATE,
            dtype="float32",
            shape=(3,),
            element_names=("shoulder", "elbow", "gripper"),
        ),
    ),
    action=(
        Feature(
            name="action",
            kind=FeatureKind.ACTION,
            dtype="float32",
            shape=(3,),
            element_names=("shoulder", "elbow", "Left_Gripper"),
        ),
    ),
    control_rate_hz=30.0,
)
NETWORK = NetworkConfig(
    vision=VisionSize(width=16, depth=1, mlp=16, heads=2, patch=8),
    language=TowerSize(width=16, depth=2, mlp=16, heads=2, kv_heads=1, head_dim=8),
    expert=TowerSize(width=8, depth=2, mlp=16, heads=2, kv_heads=1, head_dim=8),
    vocabulary=64,
    image_height=16,
    image_width=16,
    action_size=5,
)
STATISTICS = {
    "observation.state": {"q01": np.array([-1.0, -2.0, 0.0]), "q99": np.array([1.0, 2.0, 4.0])},
    "action": {"q01": np.array([-1.0, -1.0, 0.0]), "q99": np.array([3.0, 1.0, 2.0])},
}
EOS = 1


class Letters:
    """a is 10, b is 11, ...; a training prompt teaches its last letter."""

    eos_token = EOS
    special_tokens: Sequence[int] = (0, 1, 2, 3)

    def training(self, sample: Sample, state: np.ndarray, actions: np.ndarray) -> Prompt:
        tokens = self._tokens(sample.task)
        labels = np.full_like(tokens, losses.IGNORED_LABEL)
        labels[-1] = tokens[-1]
        fast = np.array([2, 40, 41, EOS], dtype=np.int64)
        return Prompt(
            tokens=tokens,
            labels=labels,
            predicts_actions=sample.task != "talk",
            fast_tokens=fast,
            fast_is_code=np.array([False, True, True, False]),
        )

    def acting(self, sample: Sample, state: np.ndarray) -> Prompt:
        return Prompt(tokens=self._tokens(sample.task))

    def asking(self, sample: Sample, request: TextRequest, state: np.ndarray) -> Prompt:
        return Prompt(tokens=self._tokens(sample.task + request.user_text))

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(chr(ord("a") + (token - 10) % 26) for token in tokens if token >= 4)

    def _tokens(self, task: str) -> np.ndarray:
        return np.array([2, *(10 + ord(letter) - ord("a") for letter in task)], dtype=np.int64)


def _policy(cls: type[Pi052Policy] = Pi052Policy, **changes: Any) -> Pi052Policy:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"network": NETWORK, "horizon": 4, "num_steps": 3, "prompt_length": 8, "flow_repeats": 2}
    policy = cls(Pi052Config(**(settings | changes)), SPEC, Letters())
    for norm in policy.network.expert.modules():  # Fresh gates are nearly shut: open them, so that everything counts.
        if isinstance(norm, AdaptiveRmsNorm):
            torch.nn.init.normal_(norm.modulation.weight, std=0.3)
    policy.set_statistics(STATISTICS)
    return policy.eval()


def _sample(seed: int, task: str = "pick", *, actions: bool = False, cameras: Sequence[str] = (FRONT, WRIST)) -> Sample:
    rng = np.random.default_rng(seed)
    observation: dict[str, np.ndarray] = {
        "observation.state": rng.normal(size=3).astype(np.float32),
        FRONT: rng.integers(0, 255, (16, 24, 3), dtype=np.uint8),
        WRIST: rng.integers(0, 255, (16, 16, 3), dtype=np.uint8),
    }
    kept = {name: value for name, value in observation.items() if name in cameras or name == "observation.state"}
    return Sample(
        observation=kept,
        task=task,
        actions=rng.normal(size=(4, 3)).astype(np.float32) if actions else None,
        is_pad=np.zeros(4, dtype=np.bool_) if actions else None,
    )


# -- building ----------------------------------------------------------------------------------------------------------


def test_configuration_round_trip() -> None:
    policy = _policy()
    again = Pi052Policy.from_config(policy.config_dict(), SPEC)
    assert again.config == policy.config
    again.load_state_dict(policy.state_dict())


def test_pi05_has_its_own_defaults_and_no_text() -> None:
    network = configs.dump(Pi052Config(network=NETWORK))["network"]
    policy = Pi05Policy.from_config({"network": network}, SPEC)
    assert (policy.config.flow_repeats, policy.config.text_weight, policy.config.knowledge_insulation) == (1, 0.0, False)
    with pytest.raises(NotOffered, match="pi05"):
        next(policy.generate([_sample(0)], TextRequest(kind=TextKind.SUBTASK), CPU))


def test_both_are_in_the_registry() -> None:
    assert registry.policy_class("pi052") is Pi052Policy
    assert registry.policy_class("pi05") is Pi05Policy


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"horizonn": 4}, "config.horizonn"),
        ({"horizon": 0}, "config.horizon"),
        ({"flow_weight": -1.0}, "config.flow_weight"),
        ({"network": {"image_height": 225}}, "image_height"),
        ({"network": {"expert": {"width": 8, "depth": 3, "mlp": 8}}}, "depth"),
        ({"trained_prefix_max_delay": 50}, "trained_prefix_max_delay"),
        ({"chunk_mode": "trained"}, "trained_prefix_max_delay"),
        ({"train_expert_only": True}, "train_expert_only"),
    ],
)
def test_impossible_configurations_name_the_key(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        Pi052Policy.from_config(changes, SPEC)


def test_too_many_numbers_and_no_camera_are_refused() -> None:
    wide = replace(SPEC, action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(6,)),))
    with pytest.raises(InvalidInput, match="has 6 numbers, the model holds 5"):
        Pi052Policy(Pi052Config(network=NETWORK), wide)
    with pytest.raises(InvalidInput, match="has no camera"):
        Pi052Policy(Pi052Config(network=NETWORK), replace(SPEC, observation=SPEC.states))


def test_parameter_groups_scale_what_their_names_say() -> None:
    policy = _policy(backbone_lr_scale=0.5, expert_lr_scale=2.0, head_lr_scale=5.0)
    groups = {group.name: group for group in policy.parameter_groups()}
    assert {name: group.lr_scale for name, group in groups.items()} == {
        "backbone": 0.5,
        "action_expert": 2.0,
        "lm_head": 5.0,
    }
    grouped = [p for group in groups.values() for p in group.parameters]
    assert len({id(p) for p in grouped}) == len(grouped) == sum(p.requires_grad for p in policy.parameters())
    assert {id(p) for p in groups["lm_head"].parameters} == {
        id(policy.network.text_head.weight),
        id(policy.network.token_table.weight),
    }


# -- samples to inputs -------------------------------------------------------------------------------------------------


def test_inputs_for_training() -> None:
    policy = _policy()
    inputs = policy.preprocess([_sample(0, actions=True), _sample(1, "talk", actions=True)], CPU)
    assert inputs.pictures.shape == (2, 2, 3, 16, 16)
    assert inputs.tokens[0].tolist() == [2, 25, 18, 12, 20, 0, 0, 0]
    assert inputs.token_valid[0].tolist() == [True] * 5 + [False] * 3
    assert inputs.labels is not None
    assert inputs.labels[0].tolist() == [-100] * 4 + [20] + [-100] * 3
    assert inputs.predicts is not None
    assert inputs.predicts.tolist() == [True, False]
    assert inputs.actions is not None
    assert inputs.actions.shape == (2, 4, 5)
    assert (inputs.actions[..., 3:] == 0).all()
    first = _sample(0, actions=True).actions
    assert first is not None
    assert inputs.actions[0, 0, 0] == pytest.approx((first[0, 0] + 1) / 4 * 2 - 1, abs=1e-6)
    assert rows.count(inputs) == 2


def test_rows_may_lack_different_cameras() -> None:
    """A row acts as if its batch lacked the camera: what is missing is masked and takes no position."""
    policy = _policy()
    samples = [_sample(0, cameras=[WRIST]), _sample(1, cameras=[FRONT]), _sample(2)]
    noise = policy.draw_noise([1, 2, 3])
    inputs = policy.preprocess(samples, CPU)
    assert inputs.picture_valid.tolist() == [[False, True], [True, False], [True, True]]
    together = policy.act(inputs, noise)
    other = replace(inputs, pictures=torch.where(inputs.picture_valid[:, :, None, None, None], inputs.pictures, 0.5))
    torch.testing.assert_close(policy.act(other, noise), together)
    for row, sample in enumerate(samples):
        torch.testing.assert_close(policy.act(policy.preprocess([sample], CPU), noise[row : row + 1])[0], together[row])


def test_rows_of_two_calls_join() -> None:
    policy = _policy()
    noise = policy.draw_noise([1, 2])
    parts = [policy.preprocess([_sample(seed, "a" * (1 + seed))], CPU) for seed in range(2)]
    joined = policy.act(rows.join(parts), noise)
    for row, part in enumerate(parts):
        torch.testing.assert_close(policy.act(part, noise[row : row + 1])[0], joined[row])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({FRONT: np.zeros((16, 24, 3), dtype=np.float32)}, "front"),
        ({FRONT: np.zeros((3, 16, 24), dtype=np.uint8)}, "front"),
        ({"observation.state": np.array([0.0, np.nan, 0.0], dtype=np.float32)}, "elbow"),
        ({"observation.state": np.zeros(4, dtype=np.float32)}, "observation.state"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, np.ndarray], field: str) -> None:
    sample = _sample(0)
    with pytest.raises(InvalidInput, match=field):
        _policy().preprocess([replace(sample, observation={**sample.observation, **change})], CPU)


def test_no_camera_at_all_a_long_prompt_and_missing_actions_are_refused() -> None:
    policy = _policy()
    with pytest.raises(InvalidInput, match="lacks every camera"):
        policy.preprocess([_sample(0, cameras=[])], CPU)
    with pytest.raises(InvalidInput, match="has 9 tokens, prompt_length is 8"):
        policy.preprocess([_sample(0, "abcdefgh")], CPU)
    with pytest.raises(InvalidInput, match="some samples have actions"):
        policy.preprocess([_sample(0, actions=True), _sample(1)], CPU)


def test_without_a_tokenizer_prepared_inputs_still_work() -> None:
    policy = _policy()
    inputs = policy.preprocess([_sample(0)], CPU)
    noise = policy.draw_noise([1])
    expected = policy.act(inputs, noise)
    policy.prompter = None
    assert torch.equal(policy.act(inputs, noise), expected)
    with pytest.raises(NotOffered, match="tokenizer"):
        policy.preprocess([_sample(0)], CPU)


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_few_steps_bring_every_term_down() -> None:
    policy = _policy(flow_weight=1.0).train()
    inputs = policy.preprocess([_sample(seed, actions=True) for seed in range(4)], CPU)
    optimizer = torch.optim.AdamW([p for group in policy.parameter_groups() for p in group.parameters], lr=3e-3)

    def terms() -> dict[str, float]:
        with torch.no_grad():
            found = policy.loss(inputs, torch.Generator().manual_seed(99)).terms
        return {name: float(value.mean()) for name, value in found.items()}

    before = terms()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        torch.autograd.backward(policy(inputs, generator).total)
        optimizer.step()
    after = terms()
    assert before.keys() == {"flow", "text", "fast"}
    assert after["flow"] < 0.9 * before["flow"]
    assert after["text"] < 0.1 * before["text"]
    assert after["fast"] < 0.1 * before["fast"]


def test_the_same_generator_is_the_same_loss() -> None:
    policy = _policy()
    inputs = policy.preprocess([_sample(0, actions=True)], CPU)
    first, again, other = (policy.loss(inputs, torch.Generator().manual_seed(seed)).total for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_samples_that_do_not_predict_train_text_alone() -> None:
    policy = _policy()
    inputs = policy.preprocess([_sample(0, "talk", actions=True), _sample(1, "pick", actions=True)], CPU)
    terms = policy.loss(inputs, torch.Generator().manual_seed(1)).terms
    assert terms["flow"][0] == terms["fast"][0] == 0
    assert terms["text"][0] > 0
    assert terms["flow"][1] > 0


def test_which_terms_run_does_not_depend_on_what_the_samples_hold() -> None:
    """Ranks with other samples would wait for this one's missing layers."""

    class Silent(Letters):
        def training(self, sample: Sample, state: np.ndarray, actions: np.ndarray) -> Prompt:
            return Prompt(tokens=self._tokens(sample.task), predicts_actions=False)

    policy = _policy()
    policy.prompter = Silent()
    inputs = policy.preprocess([_sample(0, actions=True)], CPU)
    found = policy.loss(inputs, torch.Generator().manual_seed(0))
    assert found.terms.keys() == {"flow", "text", "fast"}
    assert found.total == 0
    torch.autograd.backward(found.total)
    for name, parameter in policy.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name


@pytest.mark.parametrize("cls", [Pi05Policy, Pi052Policy])
def test_every_parameter_that_trains_gets_a_gradient(cls: type[Pi052Policy]) -> None:
    """DDP waits for each of them."""
    policy = cls.from_config(cls.tiny_config(), SPEC)
    inputs = policy.preprocess([replace(_sample(0), actions=np.zeros((8, 3), dtype=np.float32))], CPU)
    torch.autograd.backward(policy.loss(inputs, torch.Generator().manual_seed(0)).total)
    found = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert found == {name for name, p in policy.named_parameters() if p.requires_grad}


# -- acting ------------------------------------------------------------------------------------------------------------


def _committed(actions: torch.Tensor, delay: int, length: int | None = None) -> CommittedPrefix:
    count = actions.shape[0]
    return CommittedPrefix(
        actions=actions,
        length=torch.full((count,), actions.shape[1] if length is None else length),
        delay_steps=torch.full((count,), delay),
        execution_horizon=torch.full((count,), actions.shape[1]),
    )


def test_robot_space_and_back() -> None:
    policy = _policy()
    inputs = policy.preprocess([_sample(0, actions=True)], CPU)
    assert inputs.actions is not None
    given = _sample(0, actions=True).actions
    assert given is not None
    np.testing.assert_allclose(policy.postprocess(inputs.actions, inputs)[0], given, atol=1e-5)


def test_relative_actions_leave_grippers_absolute() -> None:
    policy = _policy(relative_actions=True)
    assert policy.relative_action_mask() is not None
    np.testing.assert_array_equal(policy.relative_action_mask(), [True, True, False])
    inputs = policy.preprocess([_sample(0, actions=True)], CPU)
    assert inputs.actions is not None
    given = _sample(0, actions=True).actions
    assert given is not None
    np.testing.assert_allclose(policy.postprocess(inputs.actions, inputs)[0], given, atol=1e-5)


def test_actions_without_a_state_of_their_own_are_absolute() -> None:
    short = Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(1,))
    spec = replace(SPEC, observation=(*SPEC.images, short))
    policy = Pi052Policy(Pi052Config(network=NETWORK, horizon=4, relative_actions=True), spec)
    assert policy.relative_action_mask() is not None
    np.testing.assert_array_equal(policy.relative_action_mask(), [True, False, False])


@pytest.mark.parametrize("relative", [False, True])
def test_what_is_carried_is_anchored_at_the_new_state(relative: bool) -> None:
    """The same place in the robot's units, whatever the state has become."""
    policy = _policy(relative_actions=relative)
    before, after = (policy.preprocess([_sample(seed)], CPU) for seed in (0, 1))
    chunk = policy.act(before, policy.draw_noise([1]))
    carried = policy.carried(chunk, before)
    anchored = policy.anchored(_committed(carried, 1), after)
    np.testing.assert_allclose(policy.postprocess(anchored.actions, after), policy.postprocess(chunk, before), atol=1e-5)
    assert (anchored.actions[..., 3:] == 0).all()


@pytest.mark.parametrize("relative", [False, True])
def test_a_chunk_is_finished_to_the_same_bits_in_numpy(relative: bool) -> None:
    policy = _policy(relative_actions=relative)
    inputs = policy.preprocess([_sample(0)], CPU)
    chunk = policy.act(inputs, policy.draw_noise([1]))
    actions, carried = policy.finished(chunk.numpy(), inputs.state.numpy())
    np.testing.assert_array_equal(actions, policy.postprocess(chunk, inputs))
    np.testing.assert_array_equal(carried, policy.carried(chunk, inputs).numpy())
    assert carried.dtype == actions.dtype == np.float32


def test_what_lies_beyond_the_committed_length_is_not_looked_at() -> None:
    policy = _policy(relative_actions=True)
    inputs, noise = policy.preprocess([_sample(0)], CPU), policy.draw_noise([1])
    actions = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    other = actions.clone()
    other[:, 2:] = 1e3
    first, second = (policy.act(inputs, noise, _committed(values, 1, length=2)) for values in (actions, other))
    assert torch.equal(first, second)


def test_a_row_without_a_previous_chunk_is_not_guided() -> None:
    policy = _policy()
    inputs, noise = policy.preprocess([_sample(0)], CPU), policy.draw_noise([1])
    assert torch.equal(policy.act(inputs, noise, _committed(torch.ones(1, 4, 5), 2, length=0)), policy.act(inputs, noise))


def test_trained_chunks_keep_the_committed_actions() -> None:
    policy = _policy(chunk_mode=ChunkMode.TRAINED, trained_prefix_max_delay=2)
    inputs, noise = policy.preprocess([_sample(0)], CPU), policy.draw_noise([1])
    kept = policy.carried(policy.act(inputs, noise), inputs)
    chunk = policy.act(inputs, policy.draw_noise([2]), _committed(kept, 2))
    assert torch.equal(chunk[:, :2], kept[:, :2])
    assert not torch.equal(chunk[:, 2:], kept[:, 2:])


# -- text --------------------------------------------------------------------------------------------------------------


def test_text_comes_in_pieces_and_a_seed_repeats_it() -> None:
    policy = _policy()
    request = TextRequest(kind=TextKind.SUBTASK, max_new_tokens=6, min_new_tokens=6, temperature=1.0, top_p=0.9, seed=3)
    pieces = list(policy.generate([_sample(0)], request, CPU))
    assert len(pieces) == 6
    assert "".join(policy.generate([_sample(0)], request, CPU)) == "".join(pieces)
    texts = {"".join(policy.generate([_sample(0)], replace(request, seed=seed), CPU)) for seed in range(5)}
    assert len(texts) > 1


def test_only_an_answer_about_a_picture_may_hold_locations(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def generate(network: object, state: object, rules: text.Decoding, generators: object) -> list[torch.Tensor]:
        asked.append(rules)
        return []

    monkeypatch.setattr(text, "generate", generate)
    for kind in TextKind:
        assert not list(_policy().generate([_sample(0)], TextRequest(kind=kind), CPU))
    suppressed = {kind: rules.suppress_locations for kind, rules in zip(TextKind, asked, strict=True)}
    assert suppressed == {kind: kind is not TextKind.VISUAL_QUESTION for kind in TextKind}
    assert {rules.max_new_tokens for rules in asked} == {128}


def test_text_is_for_one_sample() -> None:
    with pytest.raises(InvalidInput, match="one sample"):
        next(_policy().generate([_sample(0), _sample(1)], TextRequest(kind=TextKind.SUBTASK), CPU))


def test_a_character_of_two_tokens_comes_whole() -> None:
    policy = _policy()

    class Halves(Letters):
        def text(self, tokens: Sequence[int]) -> str:
            return "ä" * (len(tokens) // 2) + "\ufffd" * (len(tokens) % 2)

    policy.prompter = Halves()
    request = TextRequest(kind=TextKind.SUBTASK, max_new_tokens=4, min_new_tokens=4)
    assert list(policy.generate([_sample(0)], request, CPU)) == ["ä", "ä"]


@pytest.mark.parametrize("name", ["action_in", "action_out", "time_in", "time_out"])
def test_actions_and_times_stay_float32_in_mixed_precision(name: str) -> None:
    layer = getattr(_policy().network, name)
    x = torch.randn(3, layer.in_features)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)
