"""Names of SmolVLA's weights in files; what does not fit is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from manyhands.errors import Corrupt
from policies.smolvla2 import checkpoint_keys
from policies.smolvla2.config import NetworkConfig
from policies.smolvla2.model import SmolVLA2Network

from . import smol
from .golden import Golden

Weights = dict[str, torch.Tensor]
HEAD = "model.vlm_with_expert.vlm.lm_head.weight"
TABLE = "model.vlm_with_expert.vlm.model.text_model.embed_tokens.weight"
BIAS = "model.action_in_proj.bias"
OLD = {
    "normalize_inputs.buffer_observation_state.mean": torch.zeros(6),
    "normalize_targets.buffer_action.std": torch.zeros(7),
    "unnormalize_outputs.buffer_action.mean": torch.zeros(7),
}


def test_full_size_has_500_tensors() -> None:
    with torch.device("meta"):
        written = checkpoint_keys.save(SmolVLA2Network(NetworkConfig()))
    assert len(written) == 500
    counts = {part: sum(part in key for key in written) for part in (".vision_model.", ".connector.", ".text_model.")}
    assert counts == {".vision_model.": 197, ".connector.": 1, ".text_model.": 146}
    assert sum(".lm_expert." in key for key in written) == 145
    shapes = {key.removeprefix("model.vlm_with_expert."): tuple(tensor.shape) for key, tensor in written.items()}
    assert shapes["vlm.model.connector.modality_projection.proj.weight"] == (960, 12288)
    assert shapes["vlm.model.vision_model.embeddings.position_embedding.weight"] == (1024, 768)
    assert shapes["lm_expert.layers.0.self_attn.k_proj.weight"] == (320, 720)
    assert shapes["lm_expert.layers.1.self_attn.k_proj.weight"] == (320, 320)
    assert shapes["lm_expert.layers.0.mlp.up_proj.weight"] == (2048, 720)
    assert shapes["model.action_time_mlp_in.weight"] == (720, 1440)


def test_names_of_the_fixture_there_and_back(smolvla_golden: Golden) -> None:
    written = checkpoint_keys.save(smol.build(smolvla_golden).network)
    assert written.keys() == smolvla_golden.weights.keys()
    assert all(torch.equal(tensor, smolvla_golden.weights[key]) for key, tensor in written.items())


FORMS: dict[str, Callable[[Weights], Weights]] = {
    "without model.": lambda w: {key.removeprefix("model."): value for key, value in w.items()},
    "with a normaliser's buffers": lambda w: w | OLD,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_equal_weights(smolvla_golden: Golden, form: str) -> None:
    found = smol.build(smolvla_golden, weights=FORMS[form](smolvla_golden.weights))
    written = checkpoint_keys.save(found.network)
    assert all(torch.equal(tensor, smolvla_golden.weights[key]) for key, tensor in written.items())


def test_what_is_dropped_is_told(smolvla_golden: Golden) -> None:
    network = smol.build(smolvla_golden).network
    fitted = checkpoint_keys.load(network, smolvla_golden.weights | OLD)
    assert set(fitted.dropped) == set(OLD)


def test_table_and_head_stand_for_each_other(smolvla_golden: Golden) -> None:
    for absent, present in ((HEAD, TABLE), (TABLE, HEAD)):
        weights = {key: value for key, value in smolvla_golden.weights.items() if key != absent}
        network = smol.build(smolvla_golden, weights=weights).network
        assert torch.equal(network.text_head.weight, smolvla_golden.weights[present])
        assert torch.equal(network.token_table.weight, smolvla_golden.weights[present])
        assert network.text_head.weight.data_ptr() != network.token_table.weight.data_ptr()


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {key: value for key, value in w.items() if key != BIAS},
        lambda w: w | {BIAS: w[BIAS][:-1]},
        lambda w: w | {BIAS: w[BIAS] * float("nan")},
        lambda w: w | {BIAS.removeprefix("model."): w[BIAS]},
    ],
    ids=["missing", "misshapen", "not finite", "twice"],
)
def test_what_does_not_fit_is_named(smolvla_golden: Golden, change: Callable[[Weights], Weights]) -> None:
    network = smol.build(smolvla_golden).network
    before = network.action_in.bias.clone()
    with pytest.raises(Corrupt, match=r"action_in_proj\.bias"):
        checkpoint_keys.load(network, change(smolvla_golden.weights))
    assert torch.equal(network.action_in.bias, before)


def test_an_unknown_tensor_is_named(smolvla_golden: Golden) -> None:
    for key in ("model.vlm_with_expert.vlm.model.text_model.layers.99.mlp.up_proj.weight", "model.surprise.weight"):
        with pytest.raises(Corrupt, match="none of this model"):
            smol.build(smolvla_golden, weights=smolvla_golden.weights | {key: torch.zeros(1)})
