"""Names of the weights in files, and ours.

    lerobot, live        model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.0. ...
    pi05_base            the same without "model.", and without language_model.embed_tokens.weight (lm_head carries it)
    newer transformers   without the level "vision_model."
    left over from pi0   action_time_mlp_{in,out} for time_mlp_{in,out}; state_proj.* and plain expert norms, dropped

We write the first form. Old files may also hold buffers of a normaliser (normalize_inputs.*, unnormalize_outputs.*); those
live in processor files now and are dropped here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch

from .. import weight_names
from ..weight_names import TOWER_LAYER, VISION_LAYER, KeyPlan
from .model import Pi052Network

# Our module path to lerobot's, without "model."; {} is the number of a layer.
_GEMMA_LAYER = TOWER_LAYER | {
    "norm_1.modulation": "input_layernorm.dense",
    "norm_2.modulation": "post_attention_layernorm.dense",
}
_VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model"
_LANGUAGE = "paligemma_with_expert.paligemma.model.language_model"
_EXPERT = "paligemma_with_expert.gemma_expert.model"
_MODULES = {
    "vision.patch": f"{_VISION}.embeddings.patch_embedding",
    "vision.position": f"{_VISION}.embeddings.position_embedding",
    **{f"vision.layers.{{}}.{ours}": f"{_VISION}.encoder.layers.{{}}.{theirs}" for ours, theirs in VISION_LAYER.items()},
    "vision.norm": f"{_VISION}.post_layernorm",
    "projector": "paligemma_with_expert.paligemma.model.multi_modal_projector.linear",
    "token_table": f"{_LANGUAGE}.embed_tokens",
    **{f"language.layers.{{}}.{ours}": f"{_LANGUAGE}.layers.{{}}.{theirs}" for ours, theirs in _GEMMA_LAYER.items()},
    "language.norm": f"{_LANGUAGE}.norm",
    "text_head": "paligemma_with_expert.paligemma.lm_head",
    **{f"expert.layers.{{}}.{ours}": f"{_EXPERT}.layers.{{}}.{theirs}" for ours, theirs in _GEMMA_LAYER.items()},
    "expert.norm.modulation": f"{_EXPERT}.norm.dense",
    "unused_expert_head": "paligemma_with_expert.gemma_expert.lm_head",
    "action_in": "action_in_proj",
    "action_out": "action_out_proj",
    "time_in": "time_mlp_in",
    "time_out": "time_mlp_out",
}
_TO_OURS = {theirs: ours for ours, theirs in _MODULES.items()}

_PREFIX = "model."
_TIED = ("text_head.weight", "token_table.weight")
_RENAMED = {"action_time_mlp_in.": "time_mlp_in.", "action_time_mlp_out.": "time_mlp_out."}
_DROPPED = re.compile(
    r"state_proj\.|normalize_(inputs|targets)\.|unnormalize_outputs\.|"
    + re.escape(_EXPERT)
    + r"\.(layers\.\d+\.(input|post_attention)_layernorm|norm)\.weight$"
)


def to_lerobot(name: str) -> str:
    """Our name of a weight to the one lerobot writes."""
    return _PREFIX + weight_names.translate(name, _MODULES)


def from_file(key: str) -> str | None:
    """A key of any form to our name; None for one that is dropped. KeyError for one that belongs to no form."""
    key = key.removeprefix(_PREFIX)
    if _DROPPED.match(key):
        return None
    for old, new in _RENAMED.items():
        if key.startswith(old):
            key = new + key.removeprefix(old)
    # The level that newer transformers dropped.
    key = re.sub(r"\.vision_tower\.(?!vision_model\.)", ".vision_tower.vision_model.", key)
    return weight_names.translate(key, _TO_OURS)


def plan(keys: Iterable[str], expected: Iterable[str]) -> KeyPlan:
    """Fits a file's keys to the names of a network; Corrupt names what is unknown, missing or there twice."""
    return weight_names.plan(keys, expected, from_file=from_file, to_file=to_lerobot, tied=_TIED)


def load(
    network: Pi052Network,
    tensors: Mapping[str, torch.Tensor],
    *,
    device: torch.device | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> KeyPlan:
    """Puts tensors of any key form in place: weight_names.place()."""
    fitted = plan(tensors, dict(network.named_parameters()))
    weight_names.place(network, tensors, fitted, device=device, progress=progress)
    return fitted


def save(network: Pi052Network) -> dict[str, torch.Tensor]:
    """Every weight under the name lerobot writes; the tensors are the network's own, not copies."""
    return {to_lerobot(name): tensor for name, tensor in network.state_dict().items()}
