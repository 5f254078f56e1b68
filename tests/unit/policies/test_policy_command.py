"""manyhands policy, as its user sees it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from manyhands import cli
from policies import checkpoint, inspection
from policies import files as policy_files
from tests.support import lerobot_lab, prompted_lab


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(prompted_lab.policy("pi052"), tmp_path / "saved")
    return tmp_path / "saved"


def run(*words, capsys):
    assert cli.main(["policy", *words]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_init_takes_a_folder_of_tokenizers(tmp_path, capsys):
    made = prompted_lab.policy("pi052")
    (tmp_path / "files").mkdir()
    policy_files.write(made.files, tmp_path / "files")
    (tmp_path / "spec.json").write_text(json.dumps(checkpoint.spec_to_json(made.spec)))
    config = [f"--policy-config={key}={json.dumps(value)}" for key, value in made.config_dict().items()]
    where = [f"--spec={tmp_path / 'spec.json'}", f"--files={tmp_path / 'files'}", f"--output={tmp_path / 'new'}"]
    shown = run("init", "--type=pi052", *where, *config, capsys=capsys)
    assert "untrained pi052 policy" in shown
    loaded = checkpoint.load(tmp_path / "new")
    assert loaded.files == made.files
    assert loaded.config_dict() == made.config_dict()


def test_inspect_shows_parts_memory_and_prompts(folder, tmp_path, capsys):
    rows = {"persistent": [{"role": "assistant", "content": "grasp the cup", "style": "subtask", "timestamp": 0.0}]}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    shown = run("inspect", str(folder), "--task=tidy up", f"--annotations={tmp_path / 'rows.json'}", capsys=capsys)
    for part in ("vision", "token_table", "expert", "unused_expert_head", "memory to serve", "to train"):
        assert part in shown
    assert "<bos>User: tidy up, State: 128 128;" in shown
    assert "<bos>User: tidy up Assistant:" in shown
    assert "grasp the cup" in shown


def test_parts_add_up_to_the_policy(folder):
    policy = checkpoint.load(folder)
    parts = inspection.parts(policy)
    assert sum(part.parameters for part in parts) == sum(p.numel() for p in policy.parameters())
    assert sum(part.num_bytes for part in parts) == sum(p.numel() * p.element_size() for p in policy.parameters())
    head = next(part for part in parts if part.name == "unused_expert_head")
    assert head.trained == 0


def test_memory_is_what_training_keeps(folder):
    policy = checkpoint.load(folder)
    parameters = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    # Weight, gradient and two moments of what trains; the rest as it is; the average of all.
    assert inspection.memory(policy).training == 16 * trained + 4 * (parameters - trained) + 4 * parameters
    assert inspection.memory(policy).weights == 4 * parameters


@pytest.mark.parametrize("policy_type", prompted_lab.TYPES)
def test_a_robots_prefix_is_as_large_as_the_keys_and_values_kept(policy_type):
    policy = prompted_lab.policy(policy_type, prompt_length=60)
    inputs = policy.preprocess([prompted_lab.sample()], prompted_lab.CPU)
    state = policy.prefix_state(inputs, hidden=False) if policy_type.startswith("pi") else policy.action_state(inputs)
    kept = sum(k.numel() * k.element_size() + v.numel() * v.element_size() for k, v in state.keys_values)
    assert inspection.memory(policy).per_robot == kept


def test_what_is_missing_is_named(folder, tmp_path, capsys):
    (tmp_path / "rows.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "spec.json").write_text(json.dumps(checkpoint.spec_to_json(prompted_lab.SPEC)))
    init = ["init", "--type=pi052", f"--spec={tmp_path / 'spec.json'}", f"--output={tmp_path / 'new'}"]
    for words, named in (
        (["inspect", str(folder), f"--annotations={tmp_path / 'list.json'}"], "annotations: is of type list, must map"),
        ([*init, f"--files={tmp_path / 'nothing'}"], "files: "),
        (["convert", str(folder), "--output=/proc/nope/new"], "output: /proc/nope cannot be written to"),
        (["inspect"], "folder: is required"),
        (["convert", str(folder)], "output"),
        (["inspect", str(folder), f"--annotations={tmp_path / 'rows.json'}"], "rows.json cannot be read"),
    ):
        assert cli.main(["policy", *words]) != 0
        assert named in capsys.readouterr().err


def test_inspect_shows_the_prompts_there_are_and_what_the_others_miss(tmp_path, capsys):
    """pi052 without a FAST tokenizer acts and speaks; only training wants one."""
    checkpoint.save(prompted_lab.policy("pi052", with_fast=False), tmp_path / "saved")
    shown = run("inspect", str(tmp_path / "saved"), "--task=tidy up", capsys=capsys)
    assert "<bos>User: tidy up, State: 128 128;" in shown
    assert "prompt, training: none: action_tokenizer" in shown


def test_convert_refuses_what_a_folder_of_ours_has_no_use_for(folder, tmp_path, capsys):
    for flag in ("spec", "tokenizer", "recipe", "robot"):
        words = ["convert", str(folder), f"--{flag}={tmp_path / 'x'}", f"--output={tmp_path / 'new'}"]
        assert cli.main(["policy", *words]) != 0
        assert f"{flag}: is for folders of lerobot's" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("policy_type", ["pi052", "pi05"])
def test_convert_there_and_back(policy_type, tmp_path, monkeypatch, capsys):
    policy = prompted_lab.policy(policy_type).eval()
    lerobot_lab.name_pi_sizes(monkeypatch, policy.config.network)
    checkpoint.save(policy, tmp_path / "ours")
    theirs, back = tmp_path / "theirs", tmp_path / "back"
    assert "for lerobot" in run("convert", str(tmp_path / "ours"), "--to=lerobot", f"--output={theirs}", capsys=capsys)
    assert json.loads((theirs / "config.json").read_text())["type"] == policy_type
    assert "vision" in run("inspect", str(theirs), capsys=capsys)
    run("convert", str(theirs), f"--output={back}", "--control-rate-hz=15", capsys=capsys)
    loaded = checkpoint.load(back)
    assert loaded.spec.control_rate_hz == 15
    noise = policy.draw_noise([1])
    chunks = [
        made.postprocess(made.act(inputs, noise), inputs)
        for made in (policy, loaded)
        for inputs in [made.preprocess([prompted_lab.sample()], prompted_lab.CPU)]
    ]
    assert np.array_equal(*chunks)
