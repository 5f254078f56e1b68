"""Every form in which files name the weights gives the same network; what does not fit is named."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from manyhands.errors import Corrupt
from policies.pi052 import checkpoint_keys
from policies.pi052.config import NetworkConfig, Precision
from policies.pi052.model import Pi052Network
from policies.pi052.policy import Pi052Policy

from . import pi
from .golden import Golden

Weights = dict[str, torch.Tensor]
HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"
TABLE = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
BIAS = "model.action_in_proj.bias"
FIRST_NORM = "paligemma_with_expert.gemma_expert.model.layers.0.input_layernorm.weight"


def _tied(weights: Weights) -> Weights:
    """As exports that write one tensor for table and head."""
    return weights | {TABLE: weights[HEAD]}


def _published_base(weights: Weights) -> Weights:
    return {key.removeprefix("model."): value for key, value in weights.items() if key != TABLE}


def _head_left_out(weights: Weights) -> Weights:
    return {key: value for key, value in weights.items() if key != HEAD}


def _newer_transformers(weights: Weights) -> Weights:
    return {key.replace(".vision_tower.vision_model.", ".vision_tower."): value for key, value in weights.items()}


def _left_over_from_pi0(weights: Weights) -> Weights:
    renamed = {re.sub(r"^model\.time_mlp_", "action_time_mlp_", key): value for key, value in weights.items()}
    extra = {
        "state_proj.weight": torch.zeros(32, 32),
        "state_proj.bias": torch.zeros(32),
        FIRST_NORM: torch.zeros(32),
        "paligemma_with_expert.gemma_expert.model.norm.weight": torch.zeros(32),
        "normalize_inputs.buffer_observation_state.mean": torch.zeros(6),
        "unnormalize_outputs.buffer_action.std": torch.zeros(7),
    }
    return renamed | extra


FORMS: dict[str, tuple[Callable[[Weights], Weights], Callable[[Weights], Weights]]] = {
    "lerobot": (dict, dict),
    "pi05_base": (_published_base, _tied),
    "pi05_base, newer transformers": (lambda w: _newer_transformers(_published_base(w)), _tied),
    "newer transformers": (_newer_transformers, dict),
    "left over from pi0": (_left_over_from_pi0, dict),
    "head left out": (_head_left_out, lambda w: w | {HEAD: w[TABLE]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_equal_outputs(pi05_golden: Golden, form: str) -> None:
    written, meant = (make(pi05_golden.weights) for make in FORMS[form])
    found, expected = (pi.build(pi05_golden, weights=weights) for weights in (written, meant))
    inputs = pi.acting(pi.inputs_of(pi05_golden))
    noise = pi05_golden["in.noise"]
    assert torch.equal(found.act(inputs, noise, num_steps=2), expected.act(inputs, noise, num_steps=2))
    assert torch.equal(found.network.text_head.weight, expected.network.text_head.weight)
    assert torch.equal(found.network.token_table.weight, expected.network.token_table.weight)


def test_what_is_dropped_is_told(pi05_golden: Golden) -> None:
    fitted = checkpoint_keys.plan(
        _left_over_from_pi0(pi05_golden.weights), dict(pi.build(pi05_golden).network.named_parameters())
    )
    assert FIRST_NORM in fitted.dropped
    assert len(fitted.dropped) == 6


def test_table_and_head_of_a_tied_file_train_apart(pi05_golden: Golden) -> None:
    network = pi.build(pi05_golden, weights=_published_base(pi05_golden.weights)).network
    assert network.text_head.weight.data_ptr() != network.token_table.weight.data_ptr()


def test_what_is_saved_is_what_lerobot_names(pi05: Pi052Policy, pi05_golden: Golden) -> None:
    saved = checkpoint_keys.save(pi05.network)
    assert saved.keys() == pi05_golden.weights.keys()
    assert all(torch.equal(saved[name], value) for name, value in pi05_golden.weights.items())


def test_parameters_keep_what_trains(pi05_golden: Golden) -> None:
    policy = pi.build(pi05_golden, train_expert_only=True)
    training = {name.partition(".")[0] for name, p in policy.network.named_parameters() if p.requires_grad}
    assert training == {"expert", "action_in", "action_out", "time_in", "time_out"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"model.surprise.weight": torch.zeros(1)}, r"'model\.surprise\.weight' is none of this model's"),
        (lambda w: w | {HEAD.replace("lm_head", "model.language_model.layers.3.mlp.up_proj"): torch.zeros(1)}, "larger"),
        (lambda w: {k: v for k, v in w.items() if "action_in_proj.bias" not in k}, r"'model\.action_in_proj\.bias'"),
        (lambda w: w | {BIAS: torch.zeros(7)}, r"action_in_proj\.bias' is \(7,\)"),
        (lambda w: w | {BIAS: torch.full_like(w[BIAS], torch.nan)}, "not finite"),
        (lambda w: w | {"action_in_proj.bias": w[BIAS]}, "same weight"),
    ],
    ids=["unknown", "another depth", "missing", "shape", "nan", "twice"],
)
def test_what_does_not_fit_is_named(pi05_golden: Golden, change: Callable[[Weights], Weights], message: str) -> None:
    with pytest.raises(Corrupt, match=message):
        pi.build(pi05_golden, weights=change(pi05_golden.weights))


def test_a_refused_file_leaves_the_network_as_it_was(pi05_golden: Golden) -> None:
    network = pi.build(pi05_golden).network
    before = {name: p.data_ptr() for name, p in network.named_parameters()}
    with pytest.raises(Corrupt):
        checkpoint_keys.load(network, pi05_golden.weights | {BIAS: torch.zeros(7)})
    assert {name: p.data_ptr() for name, p in network.named_parameters()} == before


@pytest.mark.parametrize("precision", list(Precision))
def test_the_full_model_on_the_meta_device(precision: Precision) -> None:
    """813 tensors, 4.14 billion numbers, without a byte of memory for them."""
    with torch.device("meta"):
        network = Pi052Network(NetworkConfig(precision=precision))
    names = [checkpoint_keys.to_lerobot(name) for name in network.state_dict()]
    assert len(names) == len(set(names)) == 813
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(4.14e9, rel=0.01)
    shapes = {checkpoint_keys.to_lerobot(name): tuple(p.shape) for name, p in network.named_parameters()}
    expert = "model.paligemma_with_expert.gemma_expert"
    assert shapes[f"{expert}.lm_head.weight"] == (257152, 1024)
    assert shapes[f"{expert}.model.layers.17.input_layernorm.dense.weight"] == (3072, 1024)
    assert shapes[f"{expert}.model.layers.17.self_attn.o_proj.weight"] == (1024, 2048)
    vision = "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model"
    assert shapes[f"{vision}.embeddings.position_embedding.weight"] == (256, 1152)
    assert shapes[f"{vision}.encoder.layers.26.mlp.fc1.weight"] == (4304, 1152)
    # What lerobot keeps in float32 when the rest is bfloat16.
    kept = ("vision_tower", "multi_modal_projector", "input_layernorm", "post_attention_layernorm", "model.norm")
    for name, parameter in network.named_parameters():
        theirs = checkpoint_keys.to_lerobot(name)
        half = "paligemma_with_expert" in theirs and not any(part in theirs for part in kept)
        expected = torch.bfloat16 if half and precision is Precision.BFLOAT16 else torch.float32
        assert parameter.dtype == expected, theirs
