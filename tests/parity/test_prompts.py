"""Row 10: prompts of the four policies, from raw samples to token ids, masks and labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jinja2.sandbox
import numpy as np
import numpy.typing as npt
import pytest
import torch

from policies.losses import IGNORED_LABEL
from policies.normalization import Normalization, Normalizer, relative_mask, to_relative
from policies.policy import Sample, TextKind, TextRequest
from policies.prompt import Pieces, Prompt
from policies.prompts import smolvla
from policies.prompts.pi052 import Pi05Prompter, Pi052Prompter, Pi052PromptOptions
from policies.prompts.smolvla import SmolVLA2Prompter, SmolVLA2PromptOptions, SmolVLAPrompter
from policies.prompts.tokenizer import Tokenizer
from policies.recipes import recipe as recipes
from policies.recipes.render import Message, PromptDropout

from . import golden, golden_text

Values = dict[str, Any]
LIMIT = 1e-6


@pytest.fixture(scope="module")
def pi_tokenizer() -> Tokenizer:
    fixture = golden_text.read("prompts_pi052.json")
    return golden_text.pi_tokenizer(fixture["tokenizer"], with_locations=fixture["loc_registered"])


@pytest.fixture(scope="module")
def smol_tokenizer() -> Tokenizer:
    return golden_text.smol_tokenizer(golden_text.read("prompts_smolvla2.json")["tokenizer"])


def sample_of(values: Values) -> Sample:
    annotations = {name: values.get(name, []) for name in ("persistent", "events")}
    return Sample(
        observation={},
        task=values["task"],
        annotations=annotations,
        index=values.get("index", 0),
        timestamp_s=values.get("timestamp", 0.0),
    )


def dropout_of(options: Values, *, as_smolvla2: bool = False) -> PromptDropout:
    ending = "_dropout_prob"
    given = {name.removesuffix(ending): value for name, value in options.items() if name.endswith(ending)}
    return PromptDropout(as_smolvla2=as_smolvla2, **given)


def padded(row: npt.NDArray[np.int64], length: int, filler: int) -> list[int]:
    return [*row.tolist(), *[filler] * (length - len(row))]


# -- pi052 -------------------------------------------------------------------------------------------------------------


def normalised(mode: str, statistics: Values, name: str, values: object) -> torch.Tensor:
    array = torch.tensor(values, dtype=torch.float32)
    normalizer = Normalizer(Normalization[mode], array.shape[-1])
    normalizer.set({key: np.array(value) for key, value in statistics.items()}, field=name)
    return normalizer.normalize(array)


def model_numbers(fixture: Values, group: Values, sample: Values) -> tuple[torch.Tensor, torch.Tensor]:
    """(S,) state and (T, R) actions, normalised, of raw ones."""
    options, modes, statistics = group["options"], fixture["normalization"], group["stats"]
    state = torch.tensor(sample["state"], dtype=torch.float32)
    actions = torch.tensor(sample["action"], dtype=torch.float32)
    if options.get("use_relative_actions"):
        size = actions.shape[1]
        mask = relative_mask(size, options["action_feature_names"], options["relative_exclude_joints"])
        actions = to_relative(actions[None], state[None, :size], torch.from_numpy(mask))[0]
    return (
        normalised(modes["STATE"], statistics["observation.state"], "observation.state", state.tolist()),
        normalised(modes["ACTION"], statistics["action"], "action", actions.tolist()),
    )


def pi052_samples(tokenizer: Tokenizer) -> Iterator[tuple[Values, Prompt, torch.Tensor, torch.Tensor]]:
    """(what is expected, prompt, state, actions) of every sample."""
    fixture = golden_text.read("prompts_pi052.json")
    fast = golden_text.fast_tokenizer(fixture["fast_tokenizer"])
    for group in fixture["groups"]:
        options = Pi052PromptOptions(
            recipe=recipes.load(group["recipe"]),
            prompt_length=group["tokenizer_max_length"],
            max_action_tokens=group["max_action_tokens"],
            fast_skip_tokens=fixture["fast_skip_tokens"],
            dropout=dropout_of(group["options"]),
        )
        prompter = Pi052Prompter(tokenizer, options, fast)
        for sample in group["samples"]:
            state, actions = model_numbers(fixture, group, sample)
            yield sample, prompter.training(sample_of(sample), state.numpy(), actions.numpy()), state, actions


def test_pi052_training_prompts(pi_tokenizer: Tokenizer) -> None:
    kinds = set()
    for expected, prompt, _, _ in pi052_samples(pi_tokenizer):
        assert prompt.tokens.tolist() == expected["tokens"], expected
        assert len(prompt.tokens) == expected["length"]
        assert prompt.labels is not None
        assert prompt.labels.tolist() == expected["labels"], expected
        assert prompt.predicts_actions == expected["predict_actions"], expected
        kinds.add((prompt.predicts_actions, bool((prompt.labels != IGNORED_LABEL).any())))
    assert {(True, False), (False, True), (True, True)} <= kinds


def test_pi052_actions_and_state(pi_tokenizer: Tokenizer) -> None:
    for expected, prompt, state, actions in pi052_samples(pi_tokenizer):
        assert golden.relative_error(state, torch.tensor(expected["state_norm"])) < LIMIT
        assert golden.relative_error(actions, torch.tensor(expected["action_norm"])) < LIMIT
        assert prompt.fast_tokens is not None
        assert prompt.fast_is_code is not None
        assert prompt.fast_tokens.tolist() == expected["action_tokens"]
        begin, end = expected["code_span"]
        assert np.flatnonzero(prompt.fast_is_code).tolist() == list(range(begin, end))


def test_pi052_inference_prompts(pi_tokenizer: Tokenizer) -> None:
    prompter = Pi052Prompter(pi_tokenizer, Pi052PromptOptions())
    for case in golden_text.read("prompts_pi052.json")["inference"]:
        given = case.get("target_indices", [])
        messages = tuple(
            Message(role=message["role"], content=message["content"], is_target=index in given)
            for index, message in enumerate(case["messages"])
        )
        tokens, marks = prompter.write(messages, None, ask=case.get("generation_header", False))
        assert tokens.tolist() == case["tokens"], case
        assert marks.astype(int).tolist() == case.get("causal_marks", [0] * len(tokens)), case


def test_pi052_requests_make_those_prompts(pi_tokenizer: Tokenizer) -> None:
    """The same prompts from what a caller gives: task, request and normalised state."""
    joint = Pi052Prompter(pi_tokenizer, Pi052PromptOptions(joint=True))
    plain = Pi052Prompter(pi_tokenizer, Pi052PromptOptions())
    checked = set()
    for case in golden_text.read("prompts_pi052.json")["inference"]:
        kind, first = case["kind"], case["messages"][0]["content"]
        task, state = state_of(first)
        sample = Sample(observation={}, task=task)
        if kind == "subtask":
            prompt = plain.asking(sample, TextRequest(kind=TextKind.SUBTASK), state)
        elif kind == "memory":
            said = dict(message["content"].split(": ", 1) for message in case["messages"][1:])
            request = TextRequest(
                kind=TextKind.MEMORY,
                user_text=said.get("Completed subtask", ""),
                previous_text=said.get("Previous memory", ""),
            )
            prompt = plain.asking(sample, request, state)
        elif kind == "low_level":
            prompt = plain.acting(sample, state)
        elif kind == "joint":
            subtask = case["messages"][1]["content"]
            prompt = joint.acting(Sample(observation={}, task=task, annotations={"subtask": subtask}), state)
            assert prompt.marks is not None
            assert prompt.marks.astype(int).tolist() == case["causal_marks"]
        else:
            continue
        assert prompt.tokens.tolist() == case["tokens"], case
        checked.add(kind)
    assert checked == {"subtask", "memory", "low_level", "joint"}


def state_of(text: str) -> tuple[str, npt.NDArray[np.float32]]:
    """Task, and numbers in the middle of the bins that the text names."""
    task, _, bins = text.removesuffix(";").partition(", State: ")
    return task, np.array([(int(number) + 0.5) / 128 - 1 for number in bins.split()], dtype=np.float32)


def test_tokenizer_is_set_up_as_the_reference_is(pi_tokenizer: Tokenizer) -> None:
    for probe in golden_text.read("prompts_pi052.json")["tokenizer_probe"]:
        assert pi_tokenizer.encode(probe["text"]).tokens.tolist() == probe["no_special"]


def test_special_tokens(pi_tokenizer: Tokenizer, smol_tokenizer: Tokenizer) -> None:
    found = {
        "pi052": Pi052Prompter(pi_tokenizer, Pi052PromptOptions()).special_tokens,
        "smolvla2": SmolVLA2Prompter(smol_tokenizer, SmolVLA2PromptOptions()).special_tokens,
    }
    for policy, tokens in found.items():
        recorded = [case["special_ids"] for case in golden_text.read(f"{policy}.json")["select"] if "special_ids" in case]
        assert recorded
        for expected in recorded:
            assert set(tokens) == set(expected), policy


def test_pi05_prompts(pi_tokenizer: Tokenizer) -> None:
    stock = golden_text.read("misc.json")["stock_prompts"]
    fixture = stock["pi05"]
    prompter = Pi05Prompter(pi_tokenizer, Pi052PromptOptions(prompt_length=fixture["tokenizer_max_length"]))
    for sample in fixture["samples"]:
        state = normalised(fixture["state_mode"], stock["state_stats"], "observation.state", sample["state"])
        assert golden.relative_error(state, torch.tensor(sample["state_norm"])) < LIMIT
        acting = prompter.acting(Sample(observation={}, task=sample["task"]), state.numpy())
        training = prompter.training(Sample(observation={}, task=sample["task"]), state.numpy(), np.zeros((1, 1)))
        assert acting.tokens.tolist() == training.tokens.tolist() == sample["tokens"]


# -- SmolVLA -----------------------------------------------------------------------------------------------------------


def test_smolvla_prompts(smol_tokenizer: Tokenizer) -> None:
    stock = golden_text.read("misc.json")["stock_prompts"]
    fixture = stock["smolvla"]
    prompter = SmolVLAPrompter(smol_tokenizer, SmolVLA2PromptOptions(prompt_length=fixture["tokenizer_max_length"]))
    for sample in fixture["samples"]:
        state = normalised(fixture["state_mode"], stock["state_stats"], "observation.state", sample["state"])
        assert golden.relative_error(state, torch.tensor(sample["state_norm"])) < LIMIT
        acting = prompter.acting(Sample(observation={}, task=sample["task"]), state.numpy())
        training = prompter.training(Sample(observation={}, task=sample["task"]), state.numpy(), np.zeros((1, 1)))
        assert acting.tokens.tolist() == training.tokens.tolist() == sample["tokens"]


def test_smolvla2_training_prompts(smol_tokenizer: Tokenizer) -> None:
    for group in golden_text.read("prompts_smolvla2.json")["groups"]:
        shipped = recipes.load(group["recipe"])
        weights = group.get("blend_weights", {}).values() or [part.weight for part in shipped.components]
        components = [replace(part, weight=weight) for part, weight in zip(shipped.components, weights, strict=True)]
        options = SmolVLA2PromptOptions(
            recipe=replace(shipped, components=tuple(components)),
            prompt_length=group["max_length"],
            dropout=dropout_of(group["options"], as_smolvla2=True),
        )
        prompter = SmolVLA2Prompter(smol_tokenizer, options)
        assert prompter.pad_token == group["pad_id"]
        nothing = np.zeros(0, dtype=np.float32), np.zeros((1, 1), dtype=np.float32)
        prompts = [prompter.training(sample_of(sample), *nothing) for sample in group["samples"]]
        assert max(len(prompt.tokens) for prompt in prompts) == group["batch_length"]
        for prompt, expected in zip(prompts, group["samples"], strict=True):
            assert prompt.labels is not None
            length = len(expected["tokens"])
            assert padded(prompt.tokens, length, group["pad_id"]) == expected["tokens"], expected
            assert padded(prompt.labels, length, IGNORED_LABEL) == expected["labels"], expected
            assert prompt.predicts_actions == expected["predict_actions"], expected


def test_smolvla2_inference_prompts(smol_tokenizer: Tokenizer) -> None:
    prompter = SmolVLA2Prompter(smol_tokenizer, SmolVLA2PromptOptions())
    for case in golden_text.read("prompts_smolvla2.json")["inference"]:
        messages = tuple(Message(role=message["role"], content=message["content"]) for message in case["messages"])
        assert prompter.write(messages, ask=case["generation_header"])[0].tolist() == case["tokens"], case


def test_the_chat_format_is_the_tokenizers_template() -> None:
    """We write it ourselves; the template is data that would have to be run."""
    name = golden_text.read("prompts_smolvla2.json")["tokenizer"]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(golden_text.tokenizer_config(name)["chat_template"])
    for case in golden_text.read("prompts_smolvla2.json")["inference"]:
        as_blocks = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in case["messages"]]
        messages = tuple(Message(role=message["role"], content=message["content"]) for message in case["messages"])
        assert template.render(messages=as_blocks, add_generation_prompt=False) == smolvla._chat(messages)


SPOKEN = (
    "put the red cup  on the shelf,\nthen come back and wait",
    "日本語の文字と、絵文字🙂🙃が混ざった長い文章です。ありがとう",
    "  leading spaces, a tab\tand \u00e9\u00e8\u00ea accents - - - ... 12345 67890",
)


@pytest.mark.parametrize("kind", ["pi052", "smolvla2"])
def test_pieces_put_together_are_the_whole_text(kind: str, pi_tokenizer: Tokenizer, smol_tokenizer: Tokenizer) -> None:
    """An answer is decoded a few tokens at a time."""
    prompter: Pi052Prompter | SmolVLA2Prompter = (
        Pi052Prompter(pi_tokenizer, Pi052PromptOptions())
        if kind == "pi052"
        else SmolVLA2Prompter(smol_tokenizer, SmolVLA2PromptOptions())
    )
    random = np.random.default_rng(0)
    answers = [prompter.answer(text) for text in SPOKEN]
    answers += [random.integers(0, 5000, 60).tolist() for _ in range(20)]
    num_forgotten = 0
    for tokens in answers:
        pieces = Pieces(prompter)
        heard = "".join(pieces.add(token) or "" for token in tokens)
        whole = prompter.text(tokens)
        # Bytes that are no character change what was said of those before them.
        assert heard == whole or "\ufffd" in whole, tokens
        num_forgotten += len(pieces._tokens) < len(tokens)
    assert num_forgotten > len(SPOKEN)
