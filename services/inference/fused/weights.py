"""Weights as the fused path reads them, and how a new version of them comes in without a graph being captured again.

    state dict --stage()--> spare buffer --commit()--> the buffer every captured graph points into
                                 |
                              staged(): tried there before it serves (trial.py)

Fused: q, k and v of a layer are one matrix, gate and up are one; a picture patch is a row of a matrix. The expert's norms
take their scale, shift and gate from tables, one entry per Euler step: modulations depend on nothing but the flow time, and
the times are known. RMSNorm weights are not multiplied into the projection behind them: bfloat16 would round every weight a
second time, and the pass that divides by the root mean square multiplies by them for nothing.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from manyhands.errors import InvalidInput
from policies.flow_matching import embed_time
from policies.pi052.config import NetworkConfig

from .courier import Courier
from .fp8 import Fp8Mlp, Quantized, quantized
from .layout import Layout, layout

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Tables with one row per Euler step, and one for time 0; a plain norm has a single row and only scale.

    Attributes:
        scale: (N, D) float32, with the 1 added.
        shift: (N, D) float32.
        gate: (N, D) float32, of the branch behind this norm.
    """

    scale: torch.Tensor
    shift: torch.Tensor | None
    gate: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Attributes:
    fp8: The MLP's matrices again, for a prefix; None where it takes gate_up and down.
    """

    norm_1: Norm
    qkv: torch.Tensor
    o: torch.Tensor
    norm_2: Norm
    gate_up: torch.Tensor
    down: torch.Tensor
    fp8: Fp8Mlp | None


class FusedWeights:
    """Attributes:
    config: Of the network.
    num_steps: Euler steps of a chunk.
    views: By name, see layout.py; the same memory for as long as this object lives.
    language, expert: Layers, over those views.
    """

    def __init__(
        self,
        config: NetworkConfig,
        *,
        num_steps: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        fp8: bool = False,
    ) -> None:
        self.config = config
        self.num_steps = num_steps
        self.dtype = dtype
        self.device = device
        self._layout: Layout = layout(config, num_steps, dtype, fp8=fp8)
        self._spare: torch.Tensor | None = None
        self._staged = False
        self._courier = Courier(device)
        self._read(torch.zeros(self._layout.num_bytes, dtype=torch.uint8, device=device))

    def _read(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer
        self.views = self._layout.views(buffer)
        self.language = [self._layer(f"language.layers.{index}") for index in range(self.config.language.depth)]
        self.expert = [self._layer(f"expert.layers.{index}") for index in range(self.config.expert.depth)]
        self.language_norm = self._norm("language.norm")
        self.expert_norm = self._norm("expert.norm")

    @property
    def num_bytes(self) -> int:
        return self._layout.num_bytes

    def refill(self, state: State) -> None:
        """stage() and commit(): for a start, or while nothing runs."""
        self.stage(state)
        self.commit()

    @torch.inference_mode()
    def stage(self, state: State) -> None:
        """Brings a network's state dict (names of Pi052Network) into the spare buffer; what serves stays as it is.

        Safe while graphs run on another stream; returns when the device has everything.

        Raises:
            InvalidInput: A tensor is missing or has another shape; field names it.
        """
        self.reserve()
        assert self._spare is not None
        self._staged = False
        with self.aside():
            _fill(self._layout.views(self._spare), _Source(state, self._courier, self.device), self.config, self.num_steps)
        self._staged = True

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Work inside goes by the stream that versions come by, beside what serves, and is done at the end."""
        return self._courier.journey()

    def staged(self) -> FusedWeights:
        """What stage() brought, read like these, so that it can be tried before it serves. Not to be kept."""
        assert self._staged, "stage() comes first"
        assert self._spare is not None
        tried = copy.copy(self)
        tried._read(self._spare)
        return tried

    @torch.inference_mode()
    def commit(self) -> None:
        """Makes the staged weights those that serve: one copy on the device, in order with the current stream's work."""
        assert self._spare is not None, "stage() comes first"
        assert self._staged, "the last stage() failed"
        self._buffer.copy_(self._spare)

    def reserve(self) -> None:
        """Takes the memory that stage() needs: at the start, so that it is there when a version comes."""
        if self._spare is None:
            self._spare = torch.zeros_like(self._buffer)

    def free_spare(self) -> None:
        """Gives the memory beside the serving weights back; the next stage() takes it again."""
        self._spare, self._staged = None, False

    def _layer(self, at: str) -> Layer:
        return Layer(
            norm_1=self._norm(f"{at}.norm_1"),
            qkv=self.views[f"{at}.qkv"],
            o=self.views[f"{at}.o"],
            norm_2=self._norm(f"{at}.norm_2"),
            gate_up=self.views[f"{at}.gate_up"],
            down=self.views[f"{at}.down"],
            fp8=self._fp8(at),
        )

    def _fp8(self, at: str) -> Fp8Mlp | None:
        if f"{at}.gate_up_fp8" not in self.views:
            return None
        gate_up, down = (_fp8_view(self.views, f"{at}.{name}") for name in ("gate_up", "down"))
        return Fp8Mlp(gate_up=gate_up, down=down)

    def _norm(self, at: str) -> Norm:
        views = self.views
        return Norm(
            scale=views[f"{at}.scale"],
            shift=views.get(f"{at}.shift"),
            gate=views.get(f"{at}.gate"),
        )


def step_times(num_steps: int, device: torch.device) -> torch.Tensor:
    """(num_steps + 1,) float32: of each Euler step, and 0."""
    return torch.tensor([1.0 - step / num_steps for step in range(num_steps)] + [0.0], device=device)


def _fill(views: Mapping[str, torch.Tensor], source: _Source, config: NetworkConfig, num_steps: int) -> None:
    _fill_vision(views, source, config)
    for index in range(config.language.depth):
        at = f"language.layers.{index}"
        _fill_matrices(views, source, at)
        if f"{at}.gate_up_fp8" in views:
            _fill_fp8(views, f"{at}.gate_up")
            _fill_fp8(views, f"{at}.down")
        for norm in ("norm_1", "norm_2"):
            torch.add(
                source(f"{at}.{norm}.weight", (config.language.width,)).float(), 1.0, out=views[f"{at}.{norm}.scale"][0]
            )
    torch.add(source("language.norm.weight", (config.language.width,)).float(), 1.0, out=views["language.norm.scale"][0])
    for ours, theirs in (("token_table", "token_table.weight"), ("text_head", "text_head.weight")):
        source.bring(theirs, views[ours])
    for name in ("action_in.weight", "action_in.bias", "action_out.weight", "action_out.bias"):
        views[name].copy_(source(name, tuple(views[name].shape)))
    condition = _condition(source, config, num_steps)
    for index in range(config.expert.depth):
        at = f"expert.layers.{index}"
        _fill_matrices(views, source, at)
        _fill_modulation(views, source, f"{at}.norm_1", condition)
        _fill_modulation(views, source, f"{at}.norm_2", condition)
    _fill_modulation(views, source, "expert.norm", condition)


class _Source:
    """The tensors of a state dict, on the device, or the reason why not."""

    def __init__(self, state: State, courier: Courier, device: torch.device) -> None:
        self._state = state
        self._courier = courier
        self.device = device

    def __call__(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """A small one; large ones go by bring()."""
        return self.on_host(name, shape).detach().to(self.device, non_blocking=True)

    def bring(self, name: str, into: torch.Tensor) -> None:
        self._courier.bring(self.on_host(name, tuple(into.shape)), into)

    def on_host(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Where it is."""
        tensor = self._state.get(name)
        if tensor is None:
            raise InvalidInput("is missing from the weights", field=name)
        if shape is not None and tuple(tensor.shape) != shape:
            raise InvalidInput(f"has shape {tuple(tensor.shape)}, expected {shape}", field=name)
        return tensor


def _fill_matrices(views: Mapping[str, torch.Tensor], source: _Source, at: str) -> None:
    for fused, names in (("qkv", "qkv"), ("o", "o"), ("gate_up", ("gate", "up")), ("down", ("down",))):
        _fill_parts(views[f"{at}.{fused}"], source, [f"{at}.{name}.weight" for name in names])


def _fp8_view(views: Mapping[str, torch.Tensor], name: str) -> Quantized:
    return Quantized(values=views[f"{name}_fp8"], scale=views[f"{name}_scale"])


def _fill_fp8(views: Mapping[str, torch.Tensor], name: str) -> None:
    """From the matrix of that name, which is there."""
    made, into = quantized(views[name]), _fp8_view(views, name)
    into.values.copy_(made.values)
    into.scale.copy_(made.scale)


def _fill_parts(into: torch.Tensor, source: _Source, names: list[str]) -> None:
    """The named tensors, one below the other."""
    begin = 0
    for name in names:
        part = source.on_host(name)
        end = begin + part.shape[0]
        if end > into.shape[0] or part.shape[1:] != into.shape[1:]:
            raise InvalidInput(f"has shape {tuple(part.shape)}, which does not fit into {tuple(into.shape)}", field=name)
        source.bring(name, into[begin:end])
        begin = end
    if begin != into.shape[0]:
        raise InvalidInput(f"give {begin} rows, expected {into.shape[0]}", field=" + ".join(names))


def _fill_vision(views: Mapping[str, torch.Tensor], source: _Source, config: NetworkConfig) -> None:
    size = config.vision
    patch = source("vision.patch.weight", (size.width, 3, size.patch, size.patch)).flatten(1)
    views["vision.patch.weight"].zero_()
    views["vision.patch.weight"][:, : patch.shape[1]].copy_(patch)
    # The position table takes the patch's bias in: both are added to every patch.
    position = source("vision.position.weight", (config.num_patches, size.width)).float()
    views["vision.position"].copy_(position + source("vision.patch.bias", (size.width,)).float())
    for ours, theirs in (
        ("vision.norm", "vision.norm"),
        ("vision.projector", "projector"),
        *((f"vision.layers.{i}.{n}",) * 2 for i in range(size.depth) for n in ("norm_1", "o", "norm_2", "up", "down")),
    ):
        for kind in ("weight", "bias"):
            source.bring(f"{theirs}.{kind}", views[f"{ours}.{kind}"])
    for index in range(size.depth):
        for kind in ("weight", "bias"):
            at = f"vision.layers.{index}"
            _fill_parts(views[f"{at}.qkv.{kind}"], source, [f"{at}.{name}.{kind}" for name in "qkv"])


def _condition(source: _Source, config: NetworkConfig, num_steps: int) -> torch.Tensor:
    """(num_steps + 1, E) float32: what the expert's norms take at each time."""
    width = config.expert.width
    times = step_times(num_steps, source.device)
    hidden = embed_time(times, width, config.min_period, config.max_period)
    for name in ("time_in", "time_out"):
        weight, bias = source(f"{name}.weight", (width, width)).float(), source(f"{name}.bias", (width,)).float()
        hidden = functional.silu(functional.linear(hidden, weight, bias))
    return hidden


def _fill_modulation(views: Mapping[str, torch.Tensor], source: _Source, at: str, condition: torch.Tensor) -> None:
    width = condition.shape[1]
    weight = source(f"{at}.modulation.weight", (3 * width, width)).float()
    bias = source(f"{at}.modulation.bias", (3 * width,)).float()
    scale, shift, gate = functional.linear(condition, weight, bias).chunk(3, dim=-1)
    torch.add(scale, 1.0, out=views[f"{at}.scale"])
    views[f"{at}.shift"].copy_(shift)
    views[f"{at}.gate"].copy_(gate)
