"""The prefix of one question, a few layers at a time, so that no chunk waits for all of it.

A slice is some neighbouring layers, by the same functions that whole passes of vision and prefix are made of. Where they are
cut is decided by what layers cost, so that slices are about equally long; one ends where vision does, so that pictures that
were seen already (kept_vision.py) can be left out.

What a slice leaves for the next lies in buffers of its own: a chunk's prefix, its steps and other texts may run in between.
There is one set of buffers for each question that may be amid its prefix.

Shapes: I cameras, P tokens of a camera, L prompt tokens, S = I * P + L, D width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from policies.pi052.config import NetworkConfig

from .graphs import GraphPool, Recorded
from .slots import Residual
from .units import Units

# Numbers a second that a full-size network was measured at on an H200: multiplied and added (two each) by the layers of a
# prefix and of vision, and weights read by a pass over few tokens. What counts is how they stand to each other.
PREFIX_RATE, VISION_RATE, READ_RATE = 690e12, 320e12, 1.5e12
# Of a text step, that a slice is to take on average: cuts only fall between layers, and every slice is launched on its own.
SHARE_OF_TEXT_STEP = 0.9


class PrefixPieces:
    """What a piece of a prefix leaves for the next.

    Args:
        longest_prompt: Tokens that there is room for.
    """

    def __init__(self, units: Units, *, num_cameras: int, longest_prompt: int) -> None:
        config, device, dtype = units.weights.config, units.weights.device, units.weights.dtype
        self._units = units
        num_patches = num_cameras * config.num_patches
        self._vision_x = torch.zeros(num_patches, config.vision.width, dtype=torch.float32, device=device)
        self._vision_branch = torch.zeros(num_patches, config.vision.width, dtype=dtype, device=device)
        self._x = torch.zeros(1, num_patches + longest_prompt, config.language.width, dtype=dtype, device=device)

    def enter(self, picture_tokens: torch.Tensor, tokens: torch.Tensor) -> None:
        """In place of the pieces of vision.

        Args:
            picture_tokens: (1, I * P, D), what pictures were seen as.
            tokens: (1, L) int32.
        """
        x = self._x[:, : picture_tokens.shape[1] + tokens.shape[1]]
        x.copy_(self._units.prefix_begin(picture_tokens, tokens))

    def run(
        self,
        pieces: range,
        *,
        pictures: torch.Tensor,
        slots: torch.Tensor,
        picture_valid: torch.Tensor,
        tokens: torch.Tensor,
        token_valid: torch.Tensor,
    ) -> None:
        """Some of the pieces, behind those before them; all of them give a slot the bits that vision() and prefix() give it.

        Args:
            pictures: (I, 3, height, width), read with the first piece.
            slots: (1,) int32.
            picture_valid, tokens, token_valid: As of prefix(), one row; the same for all pieces.
        """
        units = self._units
        depth, num_layers = units.weights.config.vision.depth, len(units.weights.language) - 1
        if pieces.start == 0:
            self._vision_x.copy_(units.vision_begin(pictures))
        if pieces.start < depth:
            branch = self._vision_branch if pieces.start else None
            branch = units.vision_layers(self._vision_x, branch, range(pieces.start, min(pieces.stop, depth)))
            assert branch is not None
            self._vision_branch.copy_(branch)
        x = self._x[:, : self._vision_x.shape[0] + tokens.shape[1]]
        if pieces.start < depth <= pieces.stop:
            self.enter(units.vision_end(self._vision_x, self._vision_branch).flatten(0, 1)[None], tokens)
        if pieces.stop <= depth:
            return
        valid = units.prefix_valid(picture_valid, token_valid)
        # Looked up by every slice anew: a few small kernels, and nothing more to keep.
        rows = units.prefix_rows(slots, valid)
        residual = Residual(x=x)
        first, behind = max(pieces.start, depth) - depth, pieces.stop - depth
        units.prefix_layers(residual, rows, range(first, min(behind, num_layers)))
        if behind > num_layers:
            units.prefix_end(residual, rows, valid)
        else:
            # In place, like all that a layer does to the stream: x is the buffer.
            units.many.settled(residual, rows)


class PrefixSlices:
    """Attributes:
    num_slices: That a prefix comes in; 0: there are no questions.
    num_of_vision: Of these, the first, that only see pictures.
    """

    def __init__(
        self,
        units: Units,
        pool: GraphPool,
        inputs: Callable[[int], Mapping[str, torch.Tensor]],
        *,
        num_cameras: int,
        longest_prompt: int,
        num_slices: int | None,
    ) -> None:
        """
        Args:
            inputs: New ones of a prompt length, as PrefixPieces.run() takes them.
            num_slices: None: as many as make each about as long as a text step.
        """
        self._pieces = PrefixPieces(units, num_cameras=num_cameras, longest_prompt=longest_prompt)
        self._pool = pool
        self._inputs = inputs
        config = units.weights.config
        self._slices = planned(config, num_cameras=num_cameras, longest_prompt=longest_prompt, num_slices=num_slices)
        self.num_of_vision = sum(pieces.stop <= config.vision.depth for pieces in self._slices)
        # By prompt length, every slice; those of the prefix in progress, and which of them comes next.
        self._prepared: dict[int, list[Recorded[None]]] = {}
        self._current: Sequence[Recorded[None]] = ()
        self._next = 0

    @property
    def num_slices(self) -> int:
        return len(self._slices)

    def prepare(self, length: int) -> list[Recorded[None]]:
        """All slices of a prompt length at once: capturing one runs it, which would spoil a prefix in progress."""
        if length not in self._prepared:
            with torch.inference_mode(False):
                inputs = self._inputs(length)
            self._prepared[length] = [
                Recorded(partial(self._pieces.run, pieces), inputs, self._pool) for pieces in self._slices
            ]
        return self._prepared[length]

    def begin(self, length: int) -> Mapping[str, torch.Tensor]:
        """The inputs of all slices, to be written now; a prefix in progress is given up."""
        assert self._slices, "this network was prepared for no questions"
        self._current, self._next = self.prepare(length), 0
        return self._current[0].inputs

    def leave_out_vision(self, seen: torch.Tensor) -> None:
        """In place of its slices; behind begin(), when the prompt is written. seen: (I * P, D)."""
        assert self._next == 0, "pictures are left out before the first slice"
        self._pieces.enter(seen[None], self._current[0].inputs["tokens"])
        self._next = self.num_of_vision

    def run(self, at: int) -> None:
        """Slice number at of the prefix in progress."""
        assert at == self._next, f"slice {self._next} of this prefix comes next, not {at}"
        self._next += 1
        self._current[at].run()


def planned(config: NetworkConfig, *, num_cameras: int, longest_prompt: int, num_slices: int | None) -> list[range]:
    """The pieces (of piece_costs_s()) of every slice; num_slices as of PrefixSlices.

    Raises:
        ValueError: num_slices is 1: vision and language have a slice each at least.
    """
    num_patches = num_cameras * config.num_patches
    depth, costs_s = config.vision.depth, piece_costs_s(config, num_patches, num_patches + longest_prompt)
    if num_slices == 0:
        return []
    if num_slices == 1:
        raise ValueError("a prefix comes in two slices at least, of vision and of language; prefix_slices is 1")
    of_vision_s, of_language_s = costs_s[:depth], costs_s[depth:]
    if num_slices is None:
        longest_s = SHARE_OF_TEXT_STEP * text_step_s(config)
        num_of_vision, num_others = (math.ceil(sum(some) / longest_s) for some in (of_vision_s, of_language_s))
    else:
        fair = round(num_slices * sum(of_vision_s) / sum(costs_s))
        num_of_vision = max(1, num_slices - len(of_language_s), min(fair, num_slices - 1))
        num_others = num_slices - num_of_vision
    language = cuts(of_language_s, num_others)
    return [*cuts(of_vision_s, num_of_vision), *(range(depth + cut.start, depth + cut.stop) for cut in language)]


def cuts(costs: Sequence[float], num: int) -> list[range]:
    """Neighbouring pieces in num groups of about the same cost, none empty; fewer where there are fewer pieces."""
    num = min(num, len(costs))
    before = [0.0, *itertools.accumulate(costs)]
    ends = [0]
    for group in range(1, num):
        target = before[-1] * group / num
        possible = range(ends[-1] + 1, len(costs) - (num - group) + 1)
        ends.append(min(possible, key=lambda end, target=target: abs(before[end] - target)))  # type: ignore[misc]
    ends.append(len(costs))
    return [range(*pair) for pair in itertools.pairwise(ends)] if num else []


def piece_costs_s(config: NetworkConfig, num_patches: int, length: int) -> list[float]:
    """Seconds of the pieces of a prefix, one behind the other: vision's layers, the language layers but the last, and the
    end with the first token, which reads weights.

    Args:
        num_patches: Of all cameras.
        length: Tokens, S.
    """
    vision = config.vision
    of_vision_s = 2 * num_patches * (4 * vision.width**2 + 2 * vision.width * vision.mlp) / VISION_RATE
    of_language_s = 2 * length * _layer_numbers(config) / PREFIX_RATE
    end_s = (_layer_numbers(config) + _head_numbers(config)) / READ_RATE
    return [of_vision_s] * vision.depth + [of_language_s] * (config.language.depth - 1) + [end_s]


def text_step_s(config: NetworkConfig) -> float:
    """It reads all weights of the language tower."""
    return (config.language.depth * _layer_numbers(config) + _head_numbers(config)) / READ_RATE


def _layer_numbers(config: NetworkConfig) -> int:
    size = config.language
    return size.width * ((2 * size.heads + 2 * size.kv_heads) * size.head_dim + 3 * size.mlp)


def _head_numbers(config: NetworkConfig) -> int:
    return config.vocabulary * config.language.width
