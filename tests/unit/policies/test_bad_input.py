"""What cannot be is refused by the name of its field, with what would be right, before it reaches a kernel; for each type.

Recipes that cannot be read: test_recipe_language.py and test_policy_files.py. Configurations: the policies' own tests.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from manyhands.errors import InvalidInput, NotOffered
from manyhands.spec import Feature, FeatureKind, Spec
from policies import checkpoint, files, images, samples
from policies.losses import IGNORED_LABEL
from policies.policy import CommittedPrefix, Policy, Sample, TextKind, TextRequest
from policies.recipes import recipe as recipes
from policies.recipes.annotations import Annotations
from policies.recipes.render import Frame, survey
from tests.support import prompted_lab
from tests.support.prompted_lab import CAMERA, HORIZON, SPEC, STATE, TYPES, sample

CPU = torch.device("cpu")
WITH_TEXT = ("pi052", "smolvla2")


@pytest.fixture(params=TYPES, scope="module")
def policy(request: pytest.FixtureRequest) -> Policy[Any]:
    return prompted_lab.policy(request.param).eval()


@pytest.fixture(params=WITH_TEXT, scope="module")
def speaking(request: pytest.FixtureRequest) -> Policy[Any]:
    return prompted_lab.policy(request.param).eval()


def seen(**observation: Any) -> Sample:
    """The usual sample with some of its observation replaced; names are camera, state, or whole."""
    names = {"camera": CAMERA, "state": STATE}
    whole = sample()
    return replace(whole, observation={**whole.observation, **{names.get(n, n): v for n, v in observation.items()}})


def chunk_of(policy: Policy[Any], one: Sample) -> np.ndarray:
    inputs = policy.preprocess([one], CPU)
    return policy.postprocess(policy.act(inputs, policy.draw_noise([0])), inputs)


# -- pictures ----------------------------------------------------------------------------------------------------------

BLACK = np.zeros((8, 12, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        (BLACK.astype(np.float32), r"\(8, 12, 3\) float32.*uint8 RGB, 0 to 255; scale and round"),
        (BLACK.astype(np.float64) + 0.5, "float64.*scale and round"),
        (BLACK.astype(np.uint16), "uint16.*scale and round"),
        (BLACK.astype(np.bool_), "bool.*scale and round"),
        (BLACK[:, :, 0], r"\(8, 12\) uint8.*Repeat the grey values"),
        (BLACK[:, :, :1], r"\(8, 12, 1\).*Repeat the grey values"),
        (np.zeros((8, 12, 4), dtype=np.uint8), "Leave the fourth channel out"),
        (BLACK.transpose(2, 0, 1), r"\(3, 8, 12\).*colours come first: transpose"),
        (BLACK[None], r"\(1, 8, 12, 3\).*one picture of one camera"),
        (np.zeros((0, 12, 3), dtype=np.uint8), "at least one pixel; leave"),
        (np.zeros((8, 0, 3), dtype=np.uint8), "at least one pixel"),
        (BLACK.tolist(), "of type list, must be a NumPy array"),
        (torch.from_numpy(BLACK), "of type Tensor, must be a NumPy array"),
        (None, "of type NoneType"),
        (np.array(["a"]), r"\(1,\) str"),
        (np.broadcast_to(np.uint8(0), (1 << 14, 1 << 13, 3)), f"at most {images.MAX_PIXELS} pixels; scale it down"),
    ],
    ids=[
        "float32", "float64", "uint16", "bool", "grey", "one channel", "alpha", "channels first", "batch", "no rows",
        "no columns", "list", "tensor", "none", "text", "huge",
    ],
)  # fmt: skip
def test_what_is_no_picture_of_a_camera(policy: Policy[Any], picture: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as refused:
        policy.preprocess([seen(camera=picture)], CPU)
    assert refused.value.field == CAMERA


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 900, 3), (900, 1, 3), (3, 3, 3), (3, 12, 3), (16, 16, 3)])
def test_any_size_is_a_picture(policy: Policy[Any], shape: tuple[int, ...]) -> None:
    """So narrow that it would be less than a pixel; or of three rows, which is not a picture with its colours first."""
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.isfinite(chunk_of(policy, seen(camera=picture))).all()


def test_three_rows_are_no_colours(policy: Policy[Any]) -> None:
    red = np.zeros((3, 3, 3), dtype=np.uint8)
    red[:, :, 0] = 255
    pixels = policy.preprocess([seen(camera=red)], CPU).pictures[0, 0]
    assert (pixels[0] == 1.0).all()
    assert (pixels[1:] == -1.0).all()


def test_strides_do_not_matter(policy: Policy[Any]) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for view in (wide[::2, ::-2], wide.transpose(1, 0, 2), wide[..., ::-1]):
        assert not view.flags["C_CONTIGUOUS"]
        found, expected = (policy.preprocess([seen(camera=p)], CPU).pictures for p in (view, view.copy()))
        assert torch.equal(found, expected)


# -- cameras -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["observation.images.frnt", "front", "observation.images.empty_camera_0"])
def test_an_unknown_camera_is_named_with_those_there_are(policy: Policy[Any], name: str) -> None:
    """A misspelt one would otherwise be masked, and the policy act as if blind."""
    with pytest.raises(InvalidInput, match=f"its cameras: {re.escape(CAMERA)}") as refused:
        policy.preprocess([seen(**{name: BLACK})], CPU)
    assert refused.value.field == name


def test_vectors_that_the_policy_does_not_know_are_not_looked_at(policy: Policy[Any]) -> None:
    more = seen(**{"observation.force": np.full(6, np.nan, dtype=np.float32)})
    np.testing.assert_array_equal(chunk_of(policy, more), chunk_of(policy, seen()))


def test_a_sample_without_any_camera(policy: Policy[Any]) -> None:
    with pytest.raises(InvalidInput, match=f"lacks every camera; one of {re.escape(CAMERA)} is needed"):
        policy.preprocess([replace(sample(), observation={STATE: sample().observation[STATE]})], CPU)


def test_a_camera_may_be_missing(policy: Policy[Any]) -> None:
    """The documented fallback: its place is masked, so what a chunk is made of is the same as without such a camera."""
    second = Feature(name="observation.images.wrist", kind=FeatureKind.IMAGE, dtype="uint8", shape=(16, 16, 3))
    spec = Spec(observation=(*SPEC.observation, second), action=SPEC.action, control_rate_hz=30.0)
    wider = checkpoint.build(policy.type_name, policy.config_dict(), spec, policy.files)
    wider.load_state_dict(policy.state_dict())
    noise = policy.draw_noise([0])
    found = wider.eval().act(wider.preprocess([sample()], CPU), noise)
    torch.testing.assert_close(found, policy.act(policy.preprocess([sample()], CPU), noise))


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (np.zeros(2), r"\(2,\) float64, the spec says \(2,\) float32"),
        (np.zeros(3, dtype=np.float32), r"\(3,\) float32, the spec says \(2,\)"),
        (np.zeros((1, 2), dtype=np.float32), r"\(1, 2\) float32, the spec says \(2,\)"),
        (np.array([0.0, np.nan], dtype=np.float32), "element 1 is nan; it must be finite"),
        (np.array([-np.inf, 0.0], dtype=np.float32), "element 0 is -inf; it must be finite"),
        ([0.0, 0.0], "of type list, must be a NumPy array"),
        (np.array(["a", "b"]), r"str.*the spec says \(2,\) float32"),
    ],
    ids=["float64", "length", "rows", "nan", "infinity", "list", "text"],
)
def test_what_is_no_state(policy: Policy[Any], state: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as refused:
        policy.preprocess([seen(state=state)], CPU)
    assert refused.value.field == STATE


def test_a_missing_state(policy: Policy[Any]) -> None:
    with pytest.raises(InvalidInput, match=r"missing from the observation; it is \(2,\) float32") as refused:
        policy.preprocess([replace(sample(), observation={CAMERA: BLACK})], CPU)
    assert refused.value.field == STATE


def test_a_state_beyond_float32(policy: Policy[Any]) -> None:
    """Finite as it comes, infinite as the policy computes: as float32, and as a multiple of a tiny deviation."""
    whole = SPEC.observation[1]
    spec = Spec(observation=(SPEC.observation[0], replace(whole, dtype="float64")), action=SPEC.action, control_rate_hz=30.0)
    wide = checkpoint.build(policy.type_name, policy.config_dict(), spec, policy.files)
    with pytest.raises(InvalidInput, match=r"holds 1e\+300, which float32 cannot hold"):
        wide.preprocess([seen(state=np.array([0.0, 1e300]))], CPU)
    narrow = {"q01": np.zeros(2), "q99": np.zeros(2), "mean": np.zeros(2), "std": np.zeros(2)}
    constant = prompted_lab.policy(policy.type_name)
    constant.set_statistics({STATE: narrow, "action": narrow})
    with pytest.raises(InvalidInput, match=r"reaches 3e\+38, so far from its statistics"):
        constant.preprocess([seen(state=np.array([0.0, 3e38], dtype=np.float32))], CPU)


ACTIONS = np.zeros((HORIZON, 2), dtype=np.float32)


@pytest.mark.parametrize(
    ("actions", "says"),
    [
        (np.where(np.arange(12).reshape(6, 2) == 5, np.nan, ACTIONS), "is nan at step 2, element 1; it must be finite"),
        (np.where(np.arange(12).reshape(6, 2) == 0, np.inf, ACTIONS), "is inf at step 0, element 0"),
        (ACTIONS[1:], r"is \(5, 2\) float32, must be \(6, 2\)"),
        (ACTIONS[:, :1], r"is \(6, 1\) float32, must be \(6, 2\)"),
        (ACTIONS.astype(np.int64), r"is \(6, 2\) int64, must be \(6, 2\) float32"),
        (ACTIONS.tolist(), r"of type list, must be \(6, 2\)"),
    ],
    ids=["nan", "infinity", "short", "narrow", "whole numbers", "list"],
)
def test_what_is_no_chunk(policy: Policy[Any], actions: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as refused:
        policy.preprocess([replace(sample(train=True), actions=actions)], CPU)
    assert refused.value.field == "actions"


def test_actions_beyond_float32(policy: Policy[Any]) -> None:
    """Finite as they come, infinite as multiples of a range of zero."""
    constant = prompted_lab.policy(policy.type_name)
    narrow = {"q01": np.zeros(2), "q99": np.zeros(2), "mean": np.zeros(2), "std": np.zeros(2)}
    constant.set_statistics({STATE: narrow, "action": narrow})
    still = seen(state=np.zeros(2, dtype=np.float32))
    with pytest.raises(InvalidInput, match=r"reaches 3e\+38, so far from its statistics"):
        constant.preprocess([replace(still, actions=np.full_like(ACTIONS, 3e38))], CPU)


def test_actions_are_normalised_where_their_statistics_are() -> None:
    """A state that is not normalised has no statistics to say where the policy is."""
    policy = prompted_lab.policy("pi05", state_normalization="identity").to("meta")
    actions = torch.zeros(1, 6, 2, device=policy._statistics_device())
    assert policy._to_model_space(actions, actions[:, 0]).is_meta


def test_samples_come_with_actions_all_or_none(policy: Policy[Any]) -> None:
    with pytest.raises(InvalidInput, match="1 of 2: some samples have actions and some have not"):
        policy.preprocess([sample(), sample(train=True)], CPU)
    with pytest.raises(InvalidInput, match="samples: are none"):
        policy.preprocess([], CPU)


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (None, "None of type NoneType, must be text"),
        (b"open", "of type bytes, must be text"),
        (3, "3 of type int, must be text"),
        ("open \ud800 it", r"half a surrogate pair, '\\ud800', at 5"),
        ("a" * (1 << 20), f"has 1048576 characters, at most {samples.MAX_TEXT_CHARACTERS}; shorten it"),
    ],
    ids=["none", "bytes", "number", "surrogate", "a megabyte"],
)
@pytest.mark.parametrize("train", [False, True], ids=["acting", "training"])
def test_what_is_no_task(policy: Policy[Any], task: Any, says: str, train: bool) -> None:
    with pytest.raises(InvalidInput, match=says) as refused:
        policy.preprocess([replace(sample(train=train), task=task)], CPU)
    assert refused.value.field == "task"
    assert len(str(refused.value)) < 200


def test_a_prompt_over_the_length_is_refused_with_both_lengths(policy: Policy[Any]) -> None:
    with pytest.raises(InvalidInput, match=r"makes a prompt of \d+ tokens, the limit is 96; shorten it") as refused:
        policy.preprocess([sample(task="a" * 97)], CPU)
    assert refused.value.field == "task"


def test_in_training_a_prompt_over_the_length_is_cut(policy: Policy[Any], caplog: pytest.LogCaptureFixture) -> None:
    fresh = prompted_lab.policy(policy.type_name)
    inputs = fresh.preprocess([sample(task="a" * 97, subtask="", train=True)], CPU)
    assert inputs.token_valid.all()
    assert "is cut to prompt_length, 96" in caplog.text


@pytest.mark.parametrize("task", ["", "  \t ", "open\x00the\x07\x1b[2Jdrawer\r\n", "\u202eopen", "打开抽屉"])
def test_any_characters_are_a_task(policy: Policy[Any], task: str) -> None:
    """Also none: a policy that knows one task needs no words for it."""
    assert np.isfinite(chunk_of(policy, sample(task=task))).all()


@pytest.mark.parametrize("task", ["", "  "])
def test_training_on_no_task_and_no_annotations_is_refused_where_a_recipe_would_need_one(
    speaking: Policy[Any], task: str
) -> None:
    with pytest.raises(InvalidInput, match="sample 0 has neither a task nor annotations"):
        speaking.preprocess([sample(task=task, subtask="", train=True)], CPU)


# -- annotations and recipes -------------------------------------------------------------------------------------------

ROW = {"role": "assistant", "content": "grasp", "style": "subtask", "timestamp": 0.0}


@pytest.mark.parametrize(
    ("annotations", "says"),
    [
        ({"persistent": "abc"}, "annotations.persistent: is of type str, must be a list"),
        ({"persistent": 3}, "annotations.persistent: is of type int, must be a list"),
        ({"events": {"role": "user"}}, "annotations.events: is of type dict, must be a list"),
        ({"persistent": [None]}, r"annotations.persistent\[0\]: is None, must map role"),
        ({"persistent": [ROW, "grasp"]}, r"annotations.persistent\[1\]: is 'grasp', must map role"),
        ({"persistent": [{**ROW, "content": 3}]}, r"persistent\[0\].content: is 3 of type int, must be text"),
        ({"persistent": [{**ROW, "content": float("nan")}]}, r"content: is nan of type float, must be text"),
        ({"persistent": [{**ROW, "content": "\udfff"}]}, "half a surrogate pair"),
        ({"persistent": [{**ROW, "style": ["subtask"]}]}, r"style: is \['subtask'\] of type list"),
        ({"persistent": [{**ROW, "role": {}}]}, r"role: is {} of type dict"),
        ({"persistent": [{**ROW, "timestamp": "0"}]}, "timestamp is '0'; a persistent row has one, in seconds"),
        ({"persistent": [{**ROW, "timestamp": True}]}, "timestamp is True"),
        ({"persistent": [{**ROW, "tool_calls": 3}]}, r"persistent\[0\].tool_calls: is of type int, must be a list"),
    ],
)
def test_what_is_no_annotation(speaking: Policy[Any], annotations: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        speaking.preprocess([replace(sample(train=True), annotations=annotations)], CPU)


def test_annotations_that_are_no_mapping(policy: Policy[Any]) -> None:
    with pytest.raises(InvalidInput, match="annotations: is of type list, must map persistent and events"):
        policy.preprocess([replace(sample(), annotations=[ROW])], CPU)  # type: ignore[arg-type]


def test_a_given_subtask_must_be_text() -> None:
    """Joint mode reads it from the annotations; without one it acts on the task."""
    joint = prompted_lab.policy("pi052", prompts={"recipe": "subtask_joint", "joint": True})
    with pytest.raises(InvalidInput, match=r"annotations.subtask: is 3 of type int"):
        joint.preprocess([replace(sample(), annotations={"subtask": 3})], CPU)
    for nothing in (None, "", " "):
        assert joint.preprocess([replace(sample(), annotations={"subtask": nothing})], CPU).token_marks is None


@pytest.mark.parametrize("content", [b"", b"{}", b"blend: {}", b"messages: []", b"# nothing\n"])
@pytest.mark.parametrize("policy_type", TYPES)
def test_an_empty_recipe_is_refused_before_there_is_a_policy(policy_type: str, content: bytes) -> None:
    with pytest.raises(InvalidInput, match=rf"{re.escape(files.RECIPE)}: .*is empty"):
        prompted_lab.policy(policy_type, files={files.RECIPE: content}, prompts={"recipe": files.RECIPE})


NEVER = b"""
blend:
  remembering:
    weight: 1.0
    messages:
      - {role: user, content: "${task}", stream: high_level}
      - {role: assistant, content: "${memory}", stream: high_level, target: true, if_present: memory}
"""


@pytest.mark.parametrize("policy_type", TYPES)
def test_a_blend_that_never_renders_teaches_acting_on_the_task(policy_type: str) -> None:
    """The documented fallback of a frame; over a whole data set survey() refuses, before training starts."""
    made = prompted_lab.policy(policy_type, files={files.RECIPE: NEVER}, prompts={"recipe": files.RECIPE})
    one = sample(train=True)
    inputs = made.preprocess([one], CPU)
    assert inputs.predicts.all()
    if inputs.labels is not None:
        assert (inputs.labels == IGNORED_LABEL).all()
    acting = made.preprocess([replace(one, actions=None)], CPU)
    assert torch.equal(inputs.tokens, acting.tokens)
    frames = [Frame(annotations=Annotations.of(one.annotations), time_s=0.0, index=i, task=one.task) for i in range(3)]
    parsed = recipes.parse_yaml(NEVER, name="never", source=files.RECIPE)
    with pytest.raises(InvalidInput, match=r"'remembering' has messages for none of 3 frames; it needs active_at.*memory"):
        survey(parsed, frames)


# -- requests for text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": float("nan")}, "temperature: is nan, must be 0"),
        ({"temperature": float("inf")}, "temperature: is inf"),
        ({"temperature": -1.0}, "temperature: is -1"),
        ({"temperature": 1e-30}, "temperature: is 1e-30, must be 0 for the likeliest text, or 0.01 to 100"),
        ({"top_p": 2.0}, "top_p: is 2, must be 0 to 1"),
        ({"top_p": -0.1}, "top_p: is -0.1"),
        ({"top_p": float("nan")}, "top_p: is nan"),
        ({"max_new_tokens": -1}, "max_new_tokens: is -1, must be at least 0"),
        ({"min_new_tokens": -1}, "min_new_tokens: is -1, must be at least 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, r"min_new_tokens: is 9, over max_new_tokens \(8\)|is 9, over"),
        ({"seed": -1}, "seed: is -1, must be 0 to"),
        ({"seed": 1 << 64}, "seed: is 18446744073709551616"),
        ({"kind": "subtask"}, "kind: is 'subtask', must be one of"),
    ],
)
def test_a_request_that_cannot_be(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        TextRequest(**{"kind": TextKind.SUBTASK, **change})


@pytest.mark.parametrize("change", [{"temperature": 0.01}, {"temperature": 100.0, "top_p": 1e-9}, {"seed": (1 << 64) - 1}])
def test_requests_at_the_limits_are_answered(speaking: Policy[Any], change: dict[str, Any]) -> None:
    request = TextRequest(kind=TextKind.SUBTASK, max_new_tokens=3, **{"temperature": 1.0, **change})
    assert isinstance("".join(speaking.generate([sample()], request, CPU)), str)


@pytest.mark.parametrize(
    ("request_", "one", "says"),
    [
        (TextRequest(kind=TextKind.INTERJECTION, user_text="\ud800"), sample(), "user_text: holds half a surrogate"),
        (TextRequest(kind=TextKind.MEMORY, previous_text="a" * (1 << 17)), sample(), "previous_text: has 131072 characters"),
        (TextRequest(kind=TextKind.MEMORY, previous_text="a" * 99), sample(), "the limit is 96"),
        (TextRequest(kind=TextKind.SUBTASK), sample(task="\udc00"), "task: holds half a surrogate"),
        (TextRequest(kind=TextKind.SUBTASK), seen(camera=BLACK[..., :2]), f"{CAMERA}: is"),
        (TextRequest(kind=TextKind.SUBTASK), seen(state=np.full(2, np.nan, dtype=np.float32)), f"{STATE}: element 0 is nan"),
        (TextRequest(kind=TextKind.SUBTASK), seen(side=BLACK), "side: is no camera of this policy"),
    ],
    ids=["surrogate", "long", "over the prompt", "task", "picture", "state", "camera"],
)
def test_text_is_asked_for_with_a_whole_sample(speaking: Policy[Any], request_: TextRequest, one: Sample, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        next(iter(speaking.generate([one], request_, CPU)))


@pytest.mark.parametrize("policy_type", [name for name in TYPES if name not in WITH_TEXT])
def test_without_a_text_head_there_is_no_answer(policy_type: str) -> None:
    with pytest.raises(NotOffered, match=f"'{policy_type}' has no text head"):
        next(iter(prompted_lab.policy(policy_type).generate([sample()], TextRequest(kind=TextKind.SUBTASK), CPU)))


def test_a_least_length_over_the_usual_most_is_refused(speaking: Policy[Any]) -> None:
    most = speaking.config.max_new_tokens
    request = TextRequest(kind=TextKind.SUBTASK, min_new_tokens=most + 1)
    with pytest.raises(InvalidInput, match=f"is {most + 1}, over this policy's max_new_tokens \\({most}\\); give both"):
        next(iter(speaking.generate([sample()], request, CPU)))


# -- acting on prepared inputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, HORIZON, 3), (2, HORIZON, 8), (1, HORIZON - 1, 8)])
def test_noise_and_prefix_have_the_shape_of_a_chunk(policy: Policy[Any], shape: tuple[int, ...]) -> None:
    inputs = policy.preprocess([sample()], CPU)
    with pytest.raises(InvalidInput, match=rf"is {re.escape(str(shape))}, must be \(1, 6, 8\)") as refused:
        policy.act(inputs, torch.zeros(shape))
    assert refused.value.field == "noise"
    one = torch.ones(1, dtype=torch.int64)
    committed = CommittedPrefix(actions=torch.zeros(shape), length=one, delay_steps=one, execution_horizon=one)
    with pytest.raises(InvalidInput) as refused:
        policy.act(inputs, policy.draw_noise([0]), committed)
    assert refused.value.field == "committed.actions"


def test_a_chunk_takes_a_step(policy: Policy[Any]) -> None:
    for steps in (0, -1):
        with pytest.raises(InvalidInput, match=f"num_steps: is {steps}, must be at least 1"):
            policy.act(policy.preprocess([sample()], CPU), policy.draw_noise([0]), num_steps=steps)


def test_a_tokenizer_that_is_larger_than_the_networks_table(policy: Policy[Any]) -> None:
    config = policy.config_dict()
    short = config["network"]["vocabulary"] - 1
    small = {**config, "network": {**config["network"], "vocabulary": short}}
    with pytest.raises(InvalidInput, match=f"has ids up to {short}, the network's table ends at {short - 1}") as refused:
        checkpoint.build(policy.type_name, small, SPEC, policy.files)
    assert refused.value.field == "tokenizer"


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"chunk_mode": "trained"}, "config.chunk_mode", "'trained' needs trained_prefix_max_delay > 0; use 'guided'"),
        ({"prompts": {"recipe": "nope"}}, "config.prompts.recipe", "is 'nope', must be empty, "),
    ],
)
def test_settings_that_do_not_go_together(change: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        prompted_lab.policy("pi052", **change)
    assert refused.value.field == field
    assert refused.value.message.startswith(says)
