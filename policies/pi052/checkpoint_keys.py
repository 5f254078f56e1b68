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
from dataclasses import dataclass

import torch

from manyhands.errors import Corrupt

from .model import Pi052Network

# Our module path to lerobot's, without "model."; {} is the number of a layer.
_TOWER_LAYER = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "norm_1.modulation": "input_layernorm.dense",
    "norm_2.modulation": "post_attention_layernorm.dense",
}
_VISION_LAYER = {
    "norm_1": "layer_norm1",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "norm_2": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model"
_LANGUAGE = "paligemma_with_expert.paligemma.model.language_model"
_EXPERT = "paligemma_with_expert.gemma_expert.model"
_MODULES = {
    "vision.patch": f"{_VISION}.embeddings.patch_embedding",
    "vision.position": f"{_VISION}.embeddings.position_embedding",
    **{f"vision.layers.{{}}.{ours}": f"{_VISION}.encoder.layers.{{}}.{theirs}" for ours, theirs in _VISION_LAYER.items()},
    "vision.norm": f"{_VISION}.post_layernorm",
    "projector": "paligemma_with_expert.paligemma.model.multi_modal_projector.linear",
    "token_table": f"{_LANGUAGE}.embed_tokens",
    **{f"language.layers.{{}}.{ours}": f"{_LANGUAGE}.layers.{{}}.{theirs}" for ours, theirs in _TOWER_LAYER.items()},
    "language.norm": f"{_LANGUAGE}.norm",
    "text_head": "paligemma_with_expert.paligemma.lm_head",
    **{f"expert.layers.{{}}.{ours}": f"{_EXPERT}.layers.{{}}.{theirs}" for ours, theirs in _TOWER_LAYER.items()},
    "expert.norm.modulation": f"{_EXPERT}.norm.dense",
    "unused_expert_head": "paligemma_with_expert.gemma_expert.lm_head",
    "action_in": "action_in_proj",
    "action_out": "action_out_proj",
    "time_in": "time_mlp_in",
    "time_out": "time_mlp_out",
}
_TO_OURS = {theirs: ours for ours, theirs in _MODULES.items()}

_PREFIX = "model."
_HEAD_KEY, _TABLE_KEY = "text_head.weight", "token_table.weight"
_RENAMED = {"action_time_mlp_in.": "time_mlp_in.", "action_time_mlp_out.": "time_mlp_out."}
_DROPPED = re.compile(
    r"state_proj\.|normalize_(inputs|targets)\.|unnormalize_outputs\.|"
    + re.escape(_EXPERT)
    + r"\.(layers\.\d+\.(input|post_attention)_layernorm|norm)\.weight$"
)
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_CHECKED_AT_ONCE = 1 << 24


def to_lerobot(name: str) -> str:
    """Our name of a weight to the one lerobot writes."""
    return _PREFIX + _translate(name, _MODULES)


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
    return _translate(key, _TO_OURS)


@dataclass(frozen=True, kw_only=True)
class KeyPlan:
    """How the tensors of one file fill a network.

    Attributes:
        source: For each of our names the key to read. Two names may share one: a tied table and head are then copied apart,
            because they train independently.
        dropped: Keys that are not read, for a note to the user.
    """

    source: Mapping[str, str]
    dropped: tuple[str, ...]


def plan(keys: Iterable[str], expected: Iterable[str]) -> KeyPlan:
    """Fits a file's keys to the names of a network; Corrupt names what is unknown, missing or there twice."""
    names = set(expected)
    source: dict[str, str] = {}
    dropped = []
    for key in keys:
        try:
            name = from_file(key)
        except KeyError:
            raise Corrupt(f"tensor {key!r} is none of this model's", field=key) from None
        if name is None:
            dropped.append(key)
        elif name not in names:
            raise Corrupt(f"tensor {key!r} is none of this model's: the file's network is larger or another", field=key)
        elif name in source:
            raise Corrupt(f"tensors {source[name]!r} and {key!r} are the same weight; the file must hold one", field=key)
        else:
            source[name] = key
    for absent, present in ((_TABLE_KEY, _HEAD_KEY), (_HEAD_KEY, _TABLE_KEY)):
        if absent not in source and present in source:
            source[absent] = source[present]
    missing = sorted(to_lerobot(name) for name in names - source.keys())
    if missing:
        raise Corrupt(f"{len(missing)} tensors are missing, the first is {missing[0]!r}", field=missing[0])
    return KeyPlan(source=source, dropped=tuple(dropped))


def load(
    network: Pi052Network,
    tensors: Mapping[str, torch.Tensor],
    *,
    device: torch.device | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> KeyPlan:
    """Puts tensors of any key form in place, each cast to the precision its place has.

    A network on the meta device and a mapping that reads a tensor when asked for it need no more memory than the weights and
    the largest tensor of the file. Corrupt names the tensor that is missing, unknown, misshapen or not finite; the network
    is then as it was.

    Args:
        network: On any device; its parameters are replaced.
        tensors: By key of the file.
        device: Where they go; None: where they are.
        progress: Called with each key and the bytes it took in its place.
    """
    places = dict(network.named_parameters())
    fitted = plan(tensors, places)
    state: dict[str, torch.Tensor] = {}
    taken: set[str] = set()
    for name, key in fitted.source.items():
        tensor, place = tensors[key], places[name]
        if tensor.shape != place.shape:
            raise Corrupt(f"tensor {key!r} is {tuple(tensor.shape)}, the model has {tuple(place.shape)}", field=key)
        placed = tensor.to(device=device, dtype=place.dtype, copy=key in taken)
        # In parts: the check makes copies, and a vocabulary's table is large.
        if not all(bool(part.isfinite().all()) for part in torch.split(placed.flatten(), _CHECKED_AT_ONCE)):
            raise Corrupt(f"tensor {key!r} holds numbers that are not finite", field=key)
        state[name] = placed
        taken.add(key)
        if progress is not None:
            progress(key, placed.numel() * placed.element_size())
    network.load_state_dict(state, strict=True, assign=True)
    return fitted


def save(network: Pi052Network) -> dict[str, torch.Tensor]:
    """Every weight under the name lerobot writes; the tensors are the network's own, not copies."""
    return {to_lerobot(name): tensor for name, tensor in network.state_dict().items()}


def _translate(name: str, table: Mapping[str, str]) -> str:
    """name is module.leaf; the table speaks of modules, with {} for the number of a layer."""
    module, _, leaf = name.rpartition(".")
    layer = _LAYER.search(name)
    if layer is None:
        return f"{table[module]}.{leaf}"
    number = layer.group(1)
    pattern = module[: layer.start(1)] + "{}" + module[layer.end(1) :]
    return f"{table[pattern].format(number)}.{leaf}"
