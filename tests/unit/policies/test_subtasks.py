"""The text head chooses subtasks, and actions follow them."""

from __future__ import annotations

import pytest
import torch

from manyhands.subtasks import Subtask
from policies import subtasks
from tests.support import prompted_lab
from tests.support.prompted_lab import sample

CPU = torch.device("cpu")


def test_before_the_first_answer_the_task_is_acted_on():
    asked = sample(subtask="")
    assert subtasks.conditioned(asked, Subtask().answered("???"), joint=False) is asked


def test_the_text_head_is_asked_every_few_chunks():
    asked = []

    def ask(given, request):
        asked.append(request.previous_text)
        return f"step {'abc'[len(asked) - 1]}"

    state = Subtask()
    texts = []
    for _ in range(5):
        state = subtasks.renewed(state, sample(), ask, hold_chunks=2)
        texts.append(state.text)
        state = state.acted()
    assert texts == ["step a", "step a", "step b", "step b", "step c"]
    assert asked == ["", "step a", "step b"]


def test_a_refused_answer_is_asked_about_again_only_when_due():
    state = subtasks.renewed(Subtask(text="grasp", age_chunks=3), sample(), lambda *_: "...", hold_chunks=3)
    assert state == Subtask(text="grasp", num_refused=1)
    assert subtasks.renewed(state, sample(), pytest.fail, hold_chunks=3) is state


@pytest.mark.parametrize("joint", [False, True])
def test_pi052_acts_on_its_own_subtask(joint):
    """Both modes through the real policy: generated text, then actions on it."""
    policy = prompted_lab.policy("pi052", prompts={"joint": joint}).eval()
    acting = sample(subtask="")

    def ask(given, request):
        assert isinstance("".join(policy.generate([given], request, CPU)), str)
        return "grasp the cup"

    state = subtasks.renewed(Subtask(), acting, ask, hold_chunks=2, max_new_tokens=4)
    on_subtask = subtasks.conditioned(acting, state, joint=joint)
    shown = policy.shown_prompts(on_subtask)["acting"]
    prefix = "User: tidy up, State: 192 64;\nAssistant: grasp the cup<eos>\n" if joint else "User: grasp the cup, State:"
    assert shown.startswith(f"<bos>{prefix}")
    noise = policy.draw_noise([0])
    chunks = [policy.act(policy.preprocess([given], CPU), noise) for given in (acting, on_subtask)]
    assert not torch.equal(*chunks)
