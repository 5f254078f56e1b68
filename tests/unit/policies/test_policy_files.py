"""A checkpoint carries the tokenizers and the recipe that its policy was made with."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from manyhands.errors import Corrupt, InvalidInput, NotFound, NotOffered
from policies import checkpoint, files
from policies.policy import Sample, TextKind, TextRequest
from tests.support import prompted_lab
from tests.support.prompted_lab import SPEC, TYPES, sample

CPU = torch.device("cpu")
RECIPE = b"""
messages:
  - {role: user, content: "do ${task}", stream: low_level}
"""


@pytest.fixture(params=TYPES)
def policy(request):
    return prompted_lab.policy(request.param)


def test_a_saved_policy_reads_prompts_as_before(policy, tmp_path):
    checkpoint.save(policy, tmp_path / "saved")
    loaded = checkpoint.load(tmp_path / "saved")
    assert loaded.files == policy.files
    assert loaded.shown_prompts(sample()) == policy.shown_prompts(sample())
    inputs = [made.preprocess([sample()], CPU) for made in (policy.eval(), loaded)]
    noise = policy.draw_noise([3])
    assert torch.equal(policy.act(inputs[0], noise), loaded.act(inputs[1], noise))


def test_only_known_files_are_taken(policy, tmp_path):
    checkpoint.save(policy, tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer" / "evil.json").write_text("{}")
    assert set(checkpoint.load(tmp_path / "saved").files) <= set(files.NAMES)


def test_a_copy_shares_the_files(policy):
    copied = copy.deepcopy(policy)
    assert copied.files[files.TOKENIZER] is policy.files[files.TOKENIZER]
    assert copied.shown_prompts(sample()) == policy.shown_prompts(sample())


def test_without_a_tokenizer_only_prepared_inputs_are_taken(policy, tmp_path):
    checkpoint.save(policy, tmp_path / "saved")
    (tmp_path / "saved" / files.TOKENIZER).unlink()
    bare = checkpoint.load(tmp_path / "saved")
    with pytest.raises(NotOffered, match="without a tokenizer"):
        bare.preprocess([sample()], CPU)


@pytest.mark.parametrize("name", [files.TOKENIZER, files.ACTION_TOKENIZER])
def test_a_spoilt_tokenizer_is_corrupt(name, tmp_path):
    checkpoint.save(prompted_lab.policy("pi052"), tmp_path / "saved")
    (tmp_path / "saved" / name).write_bytes(b"{}")
    with pytest.raises(Corrupt, match="tokenizer"):
        checkpoint.load(tmp_path / "saved")


def test_half_a_fast_tokenizer_is_refused(tmp_path):
    checkpoint.save(prompted_lab.policy("pi052"), tmp_path / "saved")
    (tmp_path / "saved" / files.ACTION_TOKENIZER_CONFIG).unlink()
    with pytest.raises(NotFound, match=files.ACTION_TOKENIZER_CONFIG):
        checkpoint.load(tmp_path / "saved")


def test_training_on_fast_tokens_without_their_tokenizer_says_so():
    made = prompted_lab.policy("pi052", with_fast=False)
    with pytest.raises(NotOffered, match="fast_weight"):
        made.preprocess([sample(train=True)], CPU)


def test_a_recipe_of_the_checkpoints_own(tmp_path):
    made = prompted_lab.policy("pi052", files={files.RECIPE: RECIPE}, prompts={"recipe": files.RECIPE})
    checkpoint.save(made, tmp_path / "saved")
    loaded = checkpoint.load(tmp_path / "saved")
    assert "User: do tidy up, State:" in loaded.shown_prompts(sample(train=True))["training"]
    (tmp_path / "saved" / files.RECIPE).unlink()
    with pytest.raises(NotFound, match=r"recipe\.yaml"):
        checkpoint.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"messages: []", "messages"), (b"", "recipe.yaml"), (b"\xff\xfe", "not YAML"), (b"messages: [", "not YAML")],
)
def test_a_recipe_that_cannot_be_names_the_file(content, message):
    with pytest.raises(InvalidInput, match=message) as refused:
        prompted_lab.policy("pi052", files={files.RECIPE: content}, prompts={"recipe": files.RECIPE})
    assert files.RECIPE in str(refused.value)


def test_an_unknown_recipe_lists_the_shipped_ones(policy):
    with pytest.raises(InvalidInput, match="subtask_mem"):
        type(policy).from_config({**policy.config_dict(), "prompts": {"recipe": "../../secret"}}, SPEC)


def test_a_file_too_large_for_a_tokenizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10)
    (tmp_path / files.RECIPE).write_bytes(RECIPE)
    with pytest.raises(InvalidInput, match="over 10 bytes"):
        files.read(tmp_path)


def test_the_text_head_answers_from_a_loaded_checkpoint(tmp_path):
    made = prompted_lab.policy("smolvla2")
    checkpoint.save(made, tmp_path / "saved")
    request = TextRequest(kind=TextKind.SUBTASK, max_new_tokens=6)
    texts = ["".join(p.eval().generate([sample()], request, CPU)) for p in (made, checkpoint.load(tmp_path / "saved"))]
    assert texts[0] == texts[1]


def test_samples_are_not_changed():
    one = sample()
    before = {name: np.copy(value) for name, value in one.observation.items()}
    prompted_lab.policy("pi05").preprocess([one], CPU)
    assert isinstance(one, Sample)
    assert all(np.array_equal(before[name], value) for name, value in one.observation.items())
