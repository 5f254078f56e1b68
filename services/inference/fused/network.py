"""The fast path of one pi052 network on one device: what a scheduler calls between two decisions.

    fused = FusedPi052(network.config, FusedSettings(...), device)
    fused.weights.refill(network.state_dict())
    fused.prepare(progress)                               captures a graph for every bucket
    slot = fused.slots.take()
    tokens = fused.vision(pictures)                       (I, P, D): keep them while a picture does not change
    fused.prefix([PrefixRow(slot=slot, ...)])
    fused.begin_chunks([(slot, ChunkStart.of(noise, ...))])
    for step in range(num_steps): fused.expert_step([(slot, step)])       with rows of other robots, at other steps
    chunk = fused.slots.actions[slot]

The prefix of a question comes in slices, and whatever else is to run may run between them:

    fused.begin_question(slot, pictures, ...)
    for at in range(fused.num_prefix_slices): fused.prefix_slice(slot, at)
    logits, tokens = fused.first_text([TextRow(slot=slot, ...)])

Calls go to the current stream in order and do not wait for the device. They belong to one thread.

Shapes: I cameras, P tokens of a camera, L prompt tokens, D width, T horizon, A action size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from manyhands.errors import InvalidInput
from policies.pi052.config import NetworkConfig

from .graphs import GraphPool, Recorded
from .inputs import Inputs
from .ops import EulerTables, ReferenceOps
from .prefix_slices import PrefixSlices
from .settings import FusedSettings, Pictures, PrefixRow, TextRow, Tokens
from .slots import Slots, SlotSizes
from .starts import ChunkStart
from .units import Units, forbidden_tokens
from .vision_ahead import Gate, VisionAhead
from .weights import FusedWeights

# done, total, what was just prepared.
Progress = Callable[[int, int, str], None]


class FusedPi052:
    """Attributes:
    weights: stage() and commit() change them under the captured graphs.
    slots: Where rows live.
    num_prefix_slices: Units that a question's prefix comes in.
    num_vision_slices: Of these, the first, that pictures take.
    """

    def __init__(
        self,
        config: NetworkConfig,
        settings: FusedSettings,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.bfloat16,
        kernels: bool | None = None,
    ) -> None:
        """kernels: Triton and cuBLAS; False: plain torch; None: as the device allows."""
        self.config = config
        self.settings = settings
        self.device = device
        self.weights = FusedWeights(config, num_steps=settings.num_steps, device=device, dtype=dtype, fp8=settings.fp8)
        sizes = SlotSizes(
            num_slots=settings.num_slots,
            max_prefix=config.num_patches * settings.num_cameras + max(settings.prompt_lengths),
            max_text=settings.max_text,
            horizon=settings.horizon,
        )
        self.slots = Slots(sizes, config.language, config.action_size, device=device, dtype=dtype)
        euler = EulerTables.of(settings.num_steps, settings.max_guidance_weight, device)
        few, many = _operations(config, sizes, device, dtype, device.type == "cuda" if kernels is None else kernels)
        self.units = Units(
            weights=self.weights,
            slots=self.slots,
            euler=euler,
            few=few,
            many=many,
            forbidden=forbidden_tokens(config.vocabulary, settings.decoding, device),
            trained=settings.trained_max_delay > 0,
        )
        self._inputs = Inputs(config, settings, scratch=self.slots.scratch, dtype=self.weights.dtype, device=device)
        picture_shape = self._inputs.picture_shape
        self._question_bytes = torch.zeros(settings.num_cameras, *picture_shape, dtype=torch.uint8, device=device)
        self._pool = GraphPool(device)
        # By slot, the questions amid their prefix; places that are free.
        self._questions: dict[int, PrefixSlices] = {}
        self._free_places = [
            PrefixSlices(
                self.units,
                self._pool,
                lambda length: self._inputs.of("prefix_slices", 1, length),
                num_cameras=settings.num_cameras,
                longest_prompt=max(settings.prompt_lengths),
                num_slices=settings.prefix_slices,
            )
            for _ in range(settings.questions_at_once)
        ]
        self.num_prefix_slices = self._free_places[0].num_slices
        self.num_vision_slices = self._free_places[0].num_of_vision
        self._recorded: dict[tuple[str, int, int], Recorded[Any]] = {}

    # -- preparing -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prepare(self, progress: Progress | None = None) -> None:
        """Captures every bucket; weights must be there. Without it a bucket is captured at its first use."""
        wanted = self._buckets()
        for done, (name, rows, length) in enumerate(wanted):
            if name == "prefix_slices":
                for place in (*self._free_places, *self._questions.values()):
                    place.prepare(length)
            else:
                self._bucket(name, rows, length)
            if progress is not None:
                progress(done + 1, len(wanted), f"{name}, {rows} rows" + (f", prompt {length}" if length else ""))

    def _buckets(self) -> list[tuple[str, int, int]]:
        settings = self.settings
        seeing = "vision_of_bytes" if settings.pictures_fit else "vision"
        wanted = [(name, rows, 0) for name in (seeing, "begin") for rows in settings.prefix_rows]
        wanted += [("prefix", rows, length) for rows in settings.prefix_rows for length in settings.prompt_lengths]
        wanted += [("expert_step", rows, 0) for rows in settings.expert_rows]
        wanted += [(name, rows, 0) for name in ("first_text", "text_step") for rows in settings.text_rows]
        if settings.draft_length:
            wanted += [("check_draft", rows, 0) for rows in settings.prefix_rows]
        if self.num_prefix_slices:
            wanted += [("prefix_slices", 1, length) for length in settings.prompt_lengths]
        return wanted

    def _bucket(self, name: str, rows: int, length: int) -> Recorded[Any]:
        key = (name, rows, length)
        if key not in self._recorded:
            with torch.inference_mode(False):
                inputs = self._inputs.of(name, rows, length)
            self._recorded[key] = Recorded(getattr(self.units, name), inputs, self._pool)
        return self._recorded[key]

    # -- units ---------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def vision(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 3, height, width) float32 in [-1, 1] to (N, P, D). The answer holds until the next call of any unit."""
        cameras = self.settings.num_cameras
        rows = self._fit("vision", -(-len(pictures) // cameras), self.settings.prefix_rows)
        recorded = self._bucket("vision", rows, 0)
        recorded.inputs["pictures"][: len(pictures)].copy_(pictures, non_blocking=True)
        found: torch.Tensor = recorded.run()
        return found[: len(pictures)]

    @torch.inference_mode()
    def vision_of_bytes(self, pictures: Pictures) -> torch.Tensor:
        """vision() of pictures as a camera gives them, (height, width, 3) in the network's size; None: a missing one, black.

        The answer holds until the next call of any unit.
        """
        rows = self._fit("vision", -(-len(pictures) // self.settings.num_cameras), self.settings.prefix_rows)
        recorded = self._bucket("vision_of_bytes", rows, 0)
        self._inputs.send_pictures(pictures, recorded.inputs["pictures"][: len(pictures)])
        found: torch.Tensor = recorded.run()
        return found[: len(pictures)]

    def vision_ahead(self, gate: Gate) -> VisionAhead:
        """vision_of_bytes() of one row's pictures, launched before they come through a gate."""
        return VisionAhead(gate, lambda: self._bucket("vision_of_bytes", 1, 0), self._pool)

    @torch.inference_mode()
    def begin_chunks(self, starts: Sequence[tuple[int, ChunkStart]]) -> None:
        """Noise and what is committed of chunks, each in its slot."""
        rows = self._fit("begin", len(starts), self.settings.prefix_rows)
        numbers = self._bucket("begin", rows, 0).inputs["numbers"][: len(starts)]
        self._inputs.send_starts([start for _, start in starts], numbers)
        self._run_small(
            "begin", [slot for slot, _ in starts], [start.num_clean for _, start in starts], self.settings.prefix_rows
        )

    @torch.inference_mode()
    def prefix(self, rows: Sequence[PrefixRow]) -> torch.Tensor:
        """Rows may have prompts of different lengths: all are padded to the bucket of the longest.

        Returns:
            What their pictures were seen as again, (B, I * P, D), which holds until the next prefix().
        """
        num_rows = self._fit("prefix", len(rows), self.settings.prefix_rows)
        length = self._fit("prompt", max(len(row.tokens) for row in rows), self.settings.prompt_lengths)
        recorded = self._bucket("prefix", num_rows, length)
        inputs = recorded.inputs
        for index, row in enumerate(rows):
            inputs["picture_tokens"][index].copy_(row.picture_tokens.reshape(-1, self.config.language.width))
        self._inputs.send_prompts([(row.slot, row.picture_valid, row.tokens) for row in rows], inputs)
        recorded.run()
        return inputs["picture_tokens"][: len(rows)]

    @torch.inference_mode()
    def rehearse_prefix(self, picture_valid: Sequence[bool], tokens: Tokens, start: ChunkStart) -> None:
        """Brings a row's prompt where that of the next one will be written over it, and begins a chunk in no slot."""
        length = self._fit("prompt", len(tokens), self.settings.prompt_lengths)
        self._inputs.send_prompts([(self.slots.scratch, picture_valid, tokens)], self._bucket("prefix", 1, length).inputs)
        self.begin_chunks([(self.slots.scratch, start)])

    @torch.inference_mode()
    def begin_question(
        self, slot: int, pictures: torch.Tensor | Pictures, picture_valid: Sequence[bool], tokens: Tokens
    ) -> None:
        """Brings a question to the device: I pictures as of vision() or vision_of_bytes(), and its prompt.

        As many prefixes are in progress at a time as questions_at_once says; one that ends early is given up.
        """
        inputs = self._question_at(slot).begin(self._fit("prompt", len(tokens), self.settings.prompt_lengths))
        if isinstance(pictures, torch.Tensor):
            inputs["pictures"].copy_(pictures, non_blocking=True)
        else:
            self._inputs.send_pictures(pictures, self._question_bytes)
            inputs["pictures"].copy_(self.units.numbers_of(self._question_bytes))
        self._inputs.send_prompts([(slot, picture_valid, tokens)], inputs)

    @torch.inference_mode()
    def begin_seen_question(self, slot: int, seen: torch.Tensor, picture_valid: Sequence[bool], tokens: Tokens) -> None:
        """begin_question() of pictures that vision() has seen, (I * P, D): its slice number num_vision_slices comes next."""
        place = self._question_at(slot)
        inputs = place.begin(self._fit("prompt", len(tokens), self.settings.prompt_lengths))
        self._inputs.send_prompts([(slot, picture_valid, tokens)], inputs)
        place.leave_out_vision(seen)

    def _question_at(self, slot: int) -> PrefixSlices:
        """Where its prefix is in progress from now on."""
        if slot not in self._questions:
            self._questions[slot] = self._free_places.pop()
        return self._questions[slot]

    @torch.inference_mode()
    def prefix_slice(self, slot: int, at: int) -> None:
        """Slice number at of a question's prefix; behind the last its slot is as after vision() and prefix()."""
        assert slot in self._questions, f"slot {slot} has no prefix in progress: begin_question() comes first"
        self._questions[slot].run(at)
        if at == self.num_prefix_slices - 1:
            self.give_up_question(slot)

    def give_up_question(self, slot: int) -> None:
        """Its place is another's, if it has one."""
        if slot in self._questions:
            self._free_places.append(self._questions.pop(slot))

    @torch.inference_mode()
    def expert_step(self, rows: Sequence[tuple[int, int]]) -> None:
        """One Euler step of each row: its slot, and its step from 0 to num_steps - 1."""
        self._run_small("expert_step", [slot for slot, _ in rows], [step for _, step in rows], self.settings.expert_rows)

    @torch.inference_mode()
    def first_text(self, rows: Sequence[TextRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """The first token of each row behind its prefix: allowed logits (B, V) float32 and the likeliest tokens (B,) int64.

        The likeliest become the slots' tokens; a row that samples sets another one with set_token() before text_step().
        Both answers hold until the next call of any unit.
        """
        return self._text("first_text", rows)

    @torch.inference_mode()
    def text_step(self, rows: Sequence[TextRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of each row, as first_text() answers it."""
        return self._text("text_step", rows)

    @torch.inference_mode()
    def check_draft(self, rows: Sequence[TextRow], drafts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """What greedy decoding gives after the slots' tokens, as far as the drafts foresaw it: see units.check_draft."""
        num_rows = self._fit("draft", len(rows), self.settings.prefix_rows)
        recorded = self._bucket("check_draft", num_rows, 0)
        length = self.settings.draft_length
        self._inputs.send_slots([row.slot for row in rows], recorded.inputs["slots"])
        self._inputs.fill([row.flags for row in rows], recorded.inputs["flags"], beyond=0)
        for index, draft in enumerate(drafts):
            self._inputs.fill([int(token) for token in draft[:length]], recorded.inputs["draft"][index], beyond=-1)
        tokens, counts = recorded.run()
        return tokens[: len(rows)], counts[: len(rows)]

    @torch.inference_mode()
    def set_token(self, slot: int, token: int) -> None:
        """The newest text token of a slot, where it was drawn and is not the likeliest."""
        self.slots.token[slot] = token

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _text(self, name: str, rows: Sequence[TextRow]) -> tuple[torch.Tensor, torch.Tensor]:
        slots, flags = [row.slot for row in rows], [row.flags for row in rows]
        logits, tokens = self._run_small(name, slots, flags, self.settings.text_rows)
        return logits[: len(rows)], tokens[: len(rows)]

    def _run_small(self, name: str, slots: list[int], seconds: list[int], buckets: Sequence[int]) -> Any:
        num_rows = self._fit(name, len(slots), buckets)
        recorded = self._bucket(name, num_rows, 0)
        self._inputs.send_slots(slots, recorded.inputs["slots"], seconds)
        return recorded.run()

    def _fit(self, what: str, size: int, buckets: Sequence[int]) -> int:
        fitting = [bucket for bucket in buckets if bucket >= size]
        if not fitting:
            raise InvalidInput(f"is {size}, and the largest bucket prepared is {max(buckets)}", field=what)
        return min(fitting)


def _operations(
    config: NetworkConfig, sizes: SlotSizes, device: torch.device, dtype: torch.dtype, kernels: bool
) -> tuple[Any, Any]:
    """Operations for few and for many tokens."""
    if not kernels:
        return ReferenceOps(dtype), ReferenceOps(dtype)
    from .kernels import FewOps, ManyOps  # Triton is only there where a GPU is.

    return FewOps(config, sizes, device, dtype), ManyOps(config, sizes, device, dtype)
