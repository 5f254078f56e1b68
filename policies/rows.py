"""Rows of model inputs: frozen dataclasses whose fields are tensors with the batch first, or None."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch.nn import functional

InputsT = TypeVar("InputsT")


def count(inputs: object) -> int:
    """B, which every tensor must agree on."""
    counts = {tensor.shape[0] for tensor in _tensors(inputs)}
    if len(counts) != 1:
        raise ValueError(f"tensors of {type(inputs).__name__} have {sorted(counts)} rows; they must have the same number")
    return int(counts.pop())


def select(inputs: InputsT, rows: torch.Tensor | slice) -> InputsT:
    """The rows, in the order given."""
    return _map(inputs, lambda name: _field(inputs, name, lambda tensor: tensor[rows]))


def join(parts: Sequence[InputsT]) -> InputsT:
    """The rows of all parts, one after the other. A field is a tensor in all parts or in none.

    Token fields may differ in width, (B, L): they are as wide as the widest part, and what is added is 0, padding.
    """

    def joined(name: str) -> torch.Tensor | None:
        values = [getattr(part, name) for part in parts]
        if all(value is None for value in values):
            return None
        if values[0].dim() == 2:
            width = max(value.shape[1] for value in values)
            values = [functional.pad(value, (0, width - value.shape[1])) for value in values]
        return torch.cat(values)

    return _map(parts[0], joined)


def to_device(inputs: InputsT, device: torch.device) -> InputsT:
    return _map(inputs, lambda name: _field(inputs, name, lambda tensor: tensor.to(device, non_blocking=True)))


def num_bytes(inputs: object) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(inputs))


def _tensors(inputs: object) -> list[torch.Tensor]:
    values = [getattr(inputs, field.name) for field in dataclasses.fields(cast(Any, inputs))]
    return [value for value in values if value is not None]


def _field(inputs: object, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
    value = getattr(inputs, name)
    return None if value is None else change(value)


def _map(inputs: InputsT, value_of: Callable[[str], torch.Tensor | None]) -> InputsT:
    fields = dataclasses.fields(cast(Any, inputs))
    return cast(InputsT, dataclasses.replace(cast(Any, inputs), **{field.name: value_of(field.name) for field in fields}))
