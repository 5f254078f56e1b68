"""Names of the weights in files, and ours.

    lerobot               model.vlm_with_expert.vlm.model.vision_model.encoder.layers.0. ...; 500 tensors at full size
    old files             the same, and buffers of a normaliser (normalize_inputs.*, unnormalize_outputs.*); dropped: they
                          live in processor files now
    without "model."      read too

We write the first form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch

from .. import weight_names
from ..weight_names import TOWER_LAYER, VISION_LAYER, KeyPlan
from .model import SmolVLA2Network

_VLM = "vlm_with_expert.vlm.model"
_VISION = f"{_VLM}.vision_model"
_LANGUAGE = f"{_VLM}.text_model"
_EXPERT = "vlm_with_expert.lm_expert"
# Our module path to lerobot's, without "model."; {} is the number of a layer.
_MODULES = {
    "vision.patch": f"{_VISION}.embeddings.patch_embedding",
    "vision.position": f"{_VISION}.embeddings.position_embedding",
    **{f"vision.layers.{{}}.{ours}": f"{_VISION}.encoder.layers.{{}}.{theirs}" for ours, theirs in VISION_LAYER.items()},
    "vision.norm": f"{_VISION}.post_layernorm",
    "connector.projection": f"{_VLM}.connector.modality_projection.proj",
    "token_table": f"{_LANGUAGE}.embed_tokens",
    **{f"language.layers.{{}}.{ours}": f"{_LANGUAGE}.layers.{{}}.{theirs}" for ours, theirs in TOWER_LAYER.items()},
    "language.norm": f"{_LANGUAGE}.norm",
    "text_head": "vlm_with_expert.vlm.lm_head",
    **{f"expert.layers.{{}}.{ours}": f"{_EXPERT}.layers.{{}}.{theirs}" for ours, theirs in TOWER_LAYER.items()},
    "expert.norm": f"{_EXPERT}.norm",
    "state_in": "state_proj",
    "action_in": "action_in_proj",
    "action_out": "action_out_proj",
    "action_time_in": "action_time_mlp_in",
    "action_time_out": "action_time_mlp_out",
}
_TO_OURS = {theirs: ours for ours, theirs in _MODULES.items()}

_PREFIX = "model."
_TIED = ("text_head.weight", "token_table.weight")
_DROPPED = re.compile(r"(un)?normalize_(inputs|targets|outputs)\.")


def to_lerobot(name: str) -> str:
    """Our name of a weight to the one lerobot writes."""
    return _PREFIX + weight_names.translate(name, _MODULES)


def from_file(key: str) -> str | None:
    """A key of any form to our name; None for one that is dropped. KeyError for one that belongs to no form."""
    key = key.removeprefix(_PREFIX)
    return None if _DROPPED.match(key) else weight_names.translate(key, _TO_OURS)


def plan(keys: Iterable[str], expected: Iterable[str]) -> KeyPlan:
    """Fits a file's keys to the names of a network; Corrupt names what is unknown, missing or there twice."""
    return weight_names.plan(keys, expected, from_file=from_file, to_file=to_lerobot, tied=_TIED)


def load(
    network: SmolVLA2Network,
    tensors: Mapping[str, torch.Tensor],
    *,
    device: torch.device | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> KeyPlan:
    """Puts tensors of any key form in place: weight_names.place()."""
    fitted = plan(tensors, dict(network.named_parameters()))
    weight_names.place(network, tensors, fitted, device=device, progress=progress)
    return fitted


def save(network: SmolVLA2Network) -> dict[str, torch.Tensor]:
    """Every weight under the name lerobot writes; the tensors are the network's own, not copies."""
    return {to_lerobot(name): tensor for name, tensor in network.state_dict().items()}
