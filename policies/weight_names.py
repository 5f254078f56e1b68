"""Weights of files under other names than ours: a table of names, and tensors put in place with every one checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from manyhands.errors import Corrupt

from .tensor_file import is_finite

# Ours to transformers', inside a layer.
TOWER_LAYER = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
}
VISION_LAYER = {
    "norm_1": "layer_norm1",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "norm_2": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}

_LAYER = re.compile(r"\.layers\.(\d+)\.")


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


def plan(
    keys: Iterable[str],
    expected: Iterable[str],
    *,
    from_file: Callable[[str], str | None],
    to_file: Callable[[str], str],
    tied: tuple[str, str],
) -> KeyPlan:
    """Fits a file's keys to the names of a network; Corrupt names what is unknown, missing or there twice.

    Args:
        from_file: A key to our name; None for one that is dropped, KeyError for one that nobody knows.
        to_file: Our name to the key of the usual form, for messages.
        tied: Two of our names; where a file holds only one, it stands for both.
    """
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
    for absent, present in (tied, tied[::-1]):
        if absent not in source and present in source:
            source[absent] = source[present]
    missing = sorted(to_file(name) for name in names - source.keys())
    if missing:
        raise Corrupt(f"{len(missing)} tensors are missing, the first is {missing[0]!r}", field=missing[0])
    return KeyPlan(source=source, dropped=tuple(dropped))


def place(
    network: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    fitted: KeyPlan,
    *,
    device: torch.device | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Puts tensors in place, each cast to the precision its place has.

    A network on the meta device and a mapping that reads a tensor when asked for it need no more memory than the weights and
    the largest tensor of the file. Corrupt names the tensor that is misshapen or not finite; the network is then as it was.

    Args:
        network: On any device; its parameters are replaced.
        tensors: By key of the file.
        device: Where they go; None: where they are.
        progress: Called with each key and the bytes it has in the file.
    """
    places = dict(network.named_parameters())
    state: dict[str, torch.Tensor] = {}
    taken: set[str] = set()
    # The largest first: what a tensor needs for a moment in its old precision is then small beside what is in place already.
    for name, key in sorted(fitted.source.items(), key=lambda item: -places[item[0]].numel()):
        tensor, at = tensors[key], places[name]
        if tensor.shape != at.shape:
            raise Corrupt(f"tensor {key!r} is {tuple(tensor.shape)}, the model has {tuple(at.shape)}", field=key)
        placed = tensor.to(device=device, dtype=at.dtype, copy=key in taken)
        if not is_finite(placed):
            raise Corrupt(f"tensor {key!r} holds numbers that are not finite", field=key)
        state[name] = placed
        taken.add(key)
        if progress is not None:
            progress(key, tensor.numel() * tensor.element_size())
    network.load_state_dict(state, strict=True, assign=True)


def translate(name: str, table: Mapping[str, str]) -> str:
    """name is module.leaf; the table speaks of modules, with {} for the number of a layer. KeyError if it has none."""
    module, _, leaf = name.rpartition(".")
    layer = _LAYER.search(name)
    if layer is None:
        return f"{table[module]}.{leaf}"
    number = layer.group(1)
    pattern = module[: layer.start(1)] + "{}" + module[layer.end(1) :]
    return f"{table[pattern].format(number)}.{leaf}"
