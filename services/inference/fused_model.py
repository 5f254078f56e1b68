"""A served pi052 or pi05 on its fused path: requests to rows that units take, and what units leave to answers.

The policy itself stays on the CPU, for prompts, normalisation and as the copy that a new version is compared with.

Shapes: I cameras, T horizon, A action size of the model, R of the robot.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from manyhands.common.v1 import common_pb2
from manyhands.errors import InvalidInput, Refused
from policies import images, samples, text
from policies.pi052.config import ChunkMode
from policies.pi052.policy import Pi052Policy
from policies.policy import Sample, TextKind, TextRequest
from policies.prompt import Pieces
from policies.prompted import Read

from .engine import canary_row
from .engine_port import Observed, Row
from .fused.network import FusedPi052, FusedSettings, PrefixRow, TextRow
from .fused.slots import Slots
from .fused.units import NO_LOCATIONS, TOO_SHORT
from .models import AnyPolicy, ServedModel, canary_sample
from .rows_ahead import RowsAhead, inputs_of

logger = logging.getLogger(__name__)

# Most prompts are short; padding costs as much as words.
PROMPT_LENGTHS = (48, 96)
# Answers decoded at once, of all robots.
MAX_TEXTS = 32
# Kept of the previous answer to the same question: it often comes again.
MAX_DRAFT_TOKENS = 32
# Rows prepared before their pictures are there: one a robot, while those are decoded.
MAX_AHEAD = 64


@dataclass(kw_only=True)
class ChunkRow:
    """A chunk's inputs, on the CPU until its prefix runs.

    Attributes:
        pictures: By camera of the policy, None where the robot has none.
        noise: (T, A) float32.
        committed: (length, A) float32 in this observation's model space, or None.
        slot: While in work.
    """

    read: Read
    pictures: Sequence[npt.NDArray[np.uint8] | None]
    noise: torch.Tensor
    committed: torch.Tensor | None
    delay_steps: int
    execution_horizon: int
    slot: int | None = None


@dataclass(kw_only=True)
class TextRowInWork:
    """A question's inputs and its answer so far.

    Attributes:
        draft: What greedy decoding is likely to give, the end token included; empty for none.
    is_broken: Its logits were not numbers.
    """

    read: Read
    pictures: Sequence[npt.NDArray[np.uint8] | None]
    rules: text.Decoding
    pieces: Pieces
    generator: torch.Generator
    draft: Sequence[int] = ()
    tokens: list[int] = field(default_factory=list)
    is_broken: bool = False
    slot: int | None = None

    @property
    def flags(self) -> int:
        short = TOO_SHORT if len(self.tokens) < self.rules.min_new_tokens else 0
        return short | (NO_LOCATIONS if self.rules.suppress_locations else 0)

    @property
    def has_ended(self) -> bool:
        return self.is_broken or (bool(self.tokens) and self.tokens[-1] == self.rules.end_token)


class FusedModel(ServedModel):
    """Attributes:
    fused: Prepared work; its slots and units belong to the engine's thread.
    """

    policy: Pi052Policy

    def __init__(
        self,
        name: str,
        policy: Pi052Policy,
        device: torch.device,
        *,
        max_rows: int,
        max_texts: int,
        dtype: torch.dtype | None = None,
        kernels: bool | None = None,
    ) -> None:
        """dtype: Of the fused weights; None: bfloat16 on a GPU, float32 on the CPU."""
        super().__init__(name, policy)
        config = policy.config
        lengths = [length for length in PROMPT_LENGTHS if length < config.prompt_length]
        settings = FusedSettings(
            num_cameras=len(policy.cameras),
            num_steps=config.num_steps,
            horizon=config.horizon,
            num_slots=max_rows + max_texts,
            max_text=config.max_new_tokens,
            prompt_lengths=(*lengths, config.prompt_length),
            expert_rows=_buckets(max_rows),
            text_rows=_buckets(max_texts),
            draft_length=min(MAX_DRAFT_TOKENS, config.max_new_tokens) if policy.has_text_head else 0,
            decoding=policy.decoding(TextRequest(kind=TextKind.SUBTASK)),
            max_guidance_weight=config.max_guidance_weight,
            trained_max_delay=config.trained_prefix_max_delay if config.chunk_mode is ChunkMode.TRAINED else 0,
            schedule=config.prefix_schedule,
            whole_chunk=False,
        )
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.device = device
        self.fused = FusedPi052(config.network, settings, device, dtype=dtype, kernels=kernels)
        self.fused.weights.refill(policy.network.state_dict())
        self._ahead: RowsAhead[ChunkRow] = RowsAhead(MAX_AHEAD)

    @property
    def slots(self) -> Slots:
        return self.fused.slots

    @property
    def num_steps(self) -> int:
        return self.fused.settings.num_steps

    def bucket(self, row: ChunkRow | TextRowInWork) -> int:
        """Tokens that its prompt is padded to."""
        return next(n for n in self.fused.settings.prompt_lengths if n >= len(row.read.prompt.tokens))

    # -- requests to rows: any thread ----------------------------------------------------------------------------------

    def chunk_row(self, row: Row) -> ChunkRow:
        """InvalidInput where the policy refuses the observation."""
        sample = sample_of(row.sample)
        made = self._ahead.take(inputs_of(row))
        if made is None:
            made = self._without_pictures(row)
        else:
            samples.check([sample], self.policy.spec)  # Of its pictures nothing was known.
        made.pictures = self._pictures(sample)
        return made

    def expect(self, row: Row) -> None:
        """Prepares all of a row but its pictures, before it comes with them."""
        try:
            self._ahead.put(inputs_of(row), self._without_pictures(row))
        except Exception as error:  # The row itself says so, to whom it concerns.
            logger.debug("a row cannot be prepared ahead: %s", error)

    def _without_pictures(self, row: Row) -> ChunkRow:
        read = self.policy.observation(sample_of(row.sample))
        return ChunkRow(
            read=read,
            pictures=(),
            noise=self.policy.draw_noise([row.seed])[0],
            committed=self._anchored(row, read),
            delay_steps=row.delay_steps,
            execution_horizon=row.execution_horizon,
        )

    def text_row(self, observed: Observed, request: TextRequest) -> TextRowInWork:
        policy = self.policy
        sample = sample_of(observed)
        rules = policy.decoding(request)
        prepared = self.fused.settings.max_text
        if rules.max_new_tokens > prepared:
            raise InvalidInput(
                f"is {rules.max_new_tokens}, this server keeps room for {prepared} tokens of an answer; ask for fewer, or "
                "raise max_new_tokens in the checkpoint's configuration",
                field="max_new_tokens",
            )
        assert policy.prompter is not None
        return TextRowInWork(
            read=policy.question(sample, request),
            pictures=self._pictures(sample),
            rules=rules,
            pieces=Pieces(policy.prompter),
            generator=torch.Generator().manual_seed(request.seed),
            draft=self._draft(request),
        )

    def _draft(self, request: TextRequest) -> Sequence[int]:
        """The previous subtask, where greedy decoding may well say it again."""
        policy = self.policy
        if request.kind is not TextKind.SUBTASK or not request.previous_text or request.temperature > 0:
            return ()
        assert policy.prompter is not None
        tokens = policy.prompter.answer(request.previous_text)
        return tokens[: self.fused.settings.draft_length]

    def _anchored(self, row: Row, read: Read) -> torch.Tensor | None:
        if row.prefix is None:
            return None
        # A copy: what comes through a slot is writable, what comes from a client's message is not, and torch warns of that.
        return self.policy.anchored_actions(torch.from_numpy(np.array(row.prefix))[None], read.state)[0]

    def _pictures(self, sample: Sample) -> list[npt.NDArray[np.uint8] | None]:
        found: list[npt.NDArray[np.uint8] | None] = []
        for name in self.policy.cameras:
            picture = sample.observation.get(name)
            found.append(None if picture is None else images.check(picture, field=name))
        return found

    # -- units: the engine's thread ------------------------------------------------------------------------------------

    def run_prefix(self, rows: Sequence[ChunkRow]) -> None:
        """Takes a slot for each row."""
        self._see(rows)
        settings = self.fused.settings
        for row in rows:
            assert row.slot is not None
            self.slots.begin_chunk(
                row.slot,
                row.noise,
                committed=row.committed,
                delay_steps=row.delay_steps,
                execution_horizon=row.execution_horizon,
                schedule=settings.schedule,
                trained_max_delay=settings.trained_max_delay,
            )

    def run_expert(self, rows: Sequence[tuple[ChunkRow, int]]) -> None:
        """An Euler step of each row, which is at its own."""
        self.fused.expert_step([(_slot(row), step) for row, step in rows])

    def run_text_prefix(self, row: TextRowInWork) -> None:
        """A question's prompt, and the first token of its answer."""
        self._see([row])
        logits, tokens = self.fused.first_text([TextRow(slot=_slot(row), flags=row.flags)])
        self._take_tokens([row], logits, tokens)

    def run_draft(self, row: TextRowInWork) -> None:
        """As many tokens of the draft as greedy decoding agrees with, and the one after; none if the first one differs."""
        if not row.draft or row.has_ended or row.tokens[0] != row.draft[0] or len(row.draft) < 2:
            return
        tokens, counts = self.fused.check_draft([TextRow(slot=_slot(row), flags=row.flags)], [row.draft[1:]])
        for token in tokens[0, : int(counts[0])].tolist():
            row.tokens.append(token)
            if row.has_ended or len(row.tokens) == row.rules.max_new_tokens:
                return

    def run_text(self, rows: Sequence[TextRowInWork]) -> None:
        """The next token of each."""
        logits, tokens = self.fused.text_step([TextRow(slot=_slot(row), flags=row.flags) for row in rows])
        self._take_tokens(rows, logits, tokens)

    def release(self, row: ChunkRow | TextRowInWork, *, wipe: bool = False) -> None:
        """Gives the slot back. wipe: It holds numbers that are not finite."""
        if row.slot is not None:
            if wipe:
                self.slots.wipe(row.slot)
            self.slots.give_back(row.slot)
            row.slot = None

    def chunk(self, row: ChunkRow) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(T, R) in the robot's units and (T, A) as it is carried; waits for the device."""
        made = self.slots.actions[_slot(row)].float().cpu()[None]
        inputs: Any = row.read
        carried: npt.NDArray[np.float32] = self.policy.carried(made, inputs)[0].numpy()
        return self.policy.postprocess(made, inputs)[0], carried

    def stage(self, policy: AnyPolicy) -> None:
        """Brings another version's weights beside those that serve, from any thread; replace() makes them serve."""
        assert isinstance(policy, Pi052Policy)
        self.fused.weights.stage(policy.network.state_dict())

    def replace(self, policy: AnyPolicy, version: common_pb2.PolicyVersion, digests: Mapping[str, bytes]) -> AnyPolicy:
        """As ServedModel's. The canary runs on what serves: the plain module on the CPU would take minutes.

        Raises:
            Refused: The canary's chunk is not finite; the weights are again those that served before.
        """
        self.fused.weights.commit()
        if not np.isfinite(self.canary()).all():
            self.fused.weights.revert()
            raise Refused("its canary chunk is not finite")
        previous = super().replace(policy, version, digests)
        self._ahead.clear()  # Made with the statistics of before.
        return previous

    def canary(self) -> npt.NDArray[np.float32]:
        """(T, R) for a plain observation."""
        row = self.chunk_row(canary_row(self.policy))
        self.run_prefix([row])
        for step in range(self.num_steps):
            self.run_expert([(row, step)])
        chunk = self.chunk(row)[0]
        self.release(row, wipe=not np.isfinite(chunk).all())
        return chunk

    def example_row(self, bucket: int) -> ChunkRow:
        """With a prompt of so many tokens, for measuring."""
        row = self.chunk_row(canary_row(self.policy))
        return dataclasses.replace(row, read=_stretched(row.read, bucket))

    def example_question(self, bucket: int) -> TextRowInWork:
        row = self.text_row(canary_sample(self.policy.spec), TextRequest(kind=TextKind.SUBTASK))
        return dataclasses.replace(row, read=_stretched(row.read, bucket))

    def mark(self) -> Callable[[], None]:
        """Waits, when called, until the device has done what was asked so far, and no longer."""
        if self.device.type != "cuda":
            return _nothing
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        wait: Callable[[], None] = event.synchronize
        return wait

    def wait(self) -> None:
        """Until the device has done what was asked."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _see(self, rows: Sequence[ChunkRow | TextRowInWork]) -> None:
        """Pictures and prompts of rows into slots."""
        valid = [[picture is not None for picture in row.pictures] for row in rows]
        pictures = torch.stack([self._on_device(picture) for row in rows for picture in row.pictures])
        tokens = self.fused.vision(pictures)
        tokens = tokens.view(len(rows), -1, tokens.shape[-1])
        for row in rows:
            row.slot = self.slots.take()
            assert row.slot is not None, "the scheduler keeps no more rows in work than there are slots"
        self.fused.prefix([
            PrefixRow(slot=_slot(row), picture_tokens=tokens[index], picture_valid=valid[index],
                      tokens=row.read.prompt.tokens.tolist())
            for index, row in enumerate(rows)
        ])  # fmt: skip

    def _on_device(self, picture: npt.NDArray[np.uint8] | None) -> torch.Tensor:
        """(3, height, width) float32 in [-1, 1]; bytes travel, numbers are made where they are needed."""
        network = self.policy.config.network
        size = (network.image_height, network.image_width)
        if picture is None:
            return torch.full((3, *size), images.MISSING_VALUE, device=self.device)
        there = torch.from_numpy(np.ascontiguousarray(picture)).to(self.device, non_blocking=True)
        floats = there.permute(2, 0, 1)[None].float() / 255.0
        return images.resize_with_padding(floats, *size, images.Padding.CENTRED)[0] * 2.0 - 1.0

    def _take_tokens(self, rows: Sequence[TextRowInWork], logits: torch.Tensor, likeliest: torch.Tensor) -> None:
        broken = logits.isnan().any(dim=-1).tolist()
        for index, (row, token) in enumerate(zip(rows, likeliest.tolist(), strict=True)):
            row.is_broken = broken[index]
            if row.is_broken:
                continue
            if row.rules.temperature > 0:
                drawn = text.choose(
                    logits[index : index + 1],
                    temperature=row.rules.temperature,
                    top_p=row.rules.top_p,
                    generators=[row.generator],
                )
                token = int(drawn[0])
                self.fused.set_token(_slot(row), token)
            row.tokens.append(token)


def sample_of(observed: Observed) -> Sample:
    return Sample(observation=observed.observation, task=observed.task)


def can_be_fused(policy: AnyPolicy) -> bool:
    """Whether the fast path knows this policy. Its prefix is one block: a subtask inside an acting prompt (joint) is not."""
    if not isinstance(policy, Pi052Policy) or policy.config.prompts.joint:
        return False
    return policy.config.network.language.kv_heads == 1


def _nothing() -> None:
    """The CPU is done when a call returns."""


def _stretched(read: Read, length: int) -> Read:
    tokens = np.resize(read.prompt.tokens, length)
    return dataclasses.replace(read, prompt=dataclasses.replace(read.prompt, tokens=tokens))


def _slot(row: ChunkRow | TextRowInWork) -> int:
    assert row.slot is not None
    return row.slot


def _buckets(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to largest, which is one too."""
    sizes = [1 << power for power in range(largest.bit_length()) if 1 << power < largest]
    return (*sizes, largest)
