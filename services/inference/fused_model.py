"""A served pi052 or pi05 on its fused path: requests to rows that units take, and what units leave to answers.

The policy itself stays on the CPU, for prompts, normalisation and as the copy that a new version is compared with.

Shapes: I cameras, T horizon, A action size of the model, R of the robot.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from manyhands.common.v1 import common_pb2
from manyhands.errors import InvalidInput, Refused
from policies import samples
from policies.pi052.config import ChunkMode
from policies.pi052.policy import Pi052Policy
from policies.policy import Sample, TextKind, TextRequest
from policies.prompt import Pieces
from policies.prompted import Read

from . import launches
from .device_gate import DeviceGate
from .engine import canary_row
from .engine_port import Observed, Row
from .fused import trial
from .fused.network import FusedPi052
from .fused.settings import FusedSettings, PrefixRow
from .fused.slots import Slots
from .fused.starts import ChunkStart
from .fused_pictures import FusedPictures, pictures_fit
from .fused_texts import FusedTexts, nothing
from .models import AnyPolicy, ServedModel
from .rows_ahead import RowsAhead, inputs_of
from .rows_in_work import Chunk, ChunkRow, Take, TextRowInWork, slot_of, valid_of
from .units import doubling_sizes, expert_sizes

logger = logging.getLogger(__name__)

# Most prompts are short; padding costs as much as words.
PROMPT_LENGTHS = (48, 96)
# Answers decoded at once, of all robots.
MAX_TEXTS = 32
# Kept of the previous answer to the same question: it often comes again.
MAX_DRAFT_TOKENS = 32
# Rows prepared before their pictures are there: one a robot, while those are decoded.
MAX_ROWS_AHEAD = 64


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
        fp8: bool = False,
    ) -> None:
        """
        Args:
            dtype: Of the fused weights; None: bfloat16 on a GPU, float32 on the CPU.
            fp8: See FusedSettings.
        """
        super().__init__(name, policy)
        config = policy.config
        lengths = [length for length in PROMPT_LENGTHS if length < config.prompt_length]
        settings = FusedSettings(
            num_cameras=len(policy.cameras),
            num_steps=config.num_steps,
            horizon=config.horizon,
            # A chunk keeps its slot until it has arrived; by then others, and others again, may have been launched.
            num_slots=max_rows * (2 + math.ceil(launches.MAX_AHEAD / (config.num_steps + 1))) + max_texts,
            max_text=config.max_new_tokens,
            prompt_lengths=(*lengths, config.prompt_length),
            expert_rows=expert_sizes(max_rows),
            text_rows=doubling_sizes(max_texts),
            prefix_slices=None if policy.has_text_head else 0,
            draft_length=min(MAX_DRAFT_TOKENS, config.max_new_tokens) if policy.has_text_head else 0,
            decoding=policy.decoding(TextRequest(kind=TextKind.SUBTASK)),
            max_guidance_weight=config.max_guidance_weight,
            trained_max_delay=config.trained_prefix_max_delay if config.chunk_mode is ChunkMode.TRAINED else 0,
            schedule=config.prefix_schedule,
            pictures_fit=pictures_fit(policy),
            fp8=fp8,
        )
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.device = device
        self.fused = FusedPi052(config.network, settings, device, dtype=dtype, kernels=kernels)
        self.fused.weights.refill(policy.network.state_dict())
        self._texts = FusedTexts(self.fused)
        self._pictures = FusedPictures(self.fused, policy, keeps=policy.has_text_head)
        self._ahead: RowsAhead[ChunkRow] = RowsAhead(MAX_ROWS_AHEAD)
        # When the device began with the unit that is being launched, where that was before.
        self._began: torch.cuda.Event | None = None

    @property
    def waits_at_gate(self) -> bool:
        """Whether its pictures can come through a gate: as they are decoded, all of them, in the order of the spec."""
        images = [image.name for image in self.used_spec.images]
        return self.fused.settings.pictures_fit and list(self.policy.cameras) == images

    def use_gate(self, gate: DeviceGate) -> None:
        """Makes see_ahead() do something, where it can."""
        if self.waits_at_gate:
            self._pictures.use_gate(gate)

    @property
    def slots(self) -> Slots:
        return self.fused.slots

    @property
    def num_steps(self) -> int:
        return self.fused.settings.num_steps

    @property
    def num_prefix_slices(self) -> int:
        """Units that a question's prefix comes in."""
        return self.fused.num_prefix_slices

    def bucket(self, row: ChunkRow | TextRowInWork) -> int:
        """Tokens that its prompt is padded to."""
        return self._padded(len(row.read.prompt.tokens))

    def _padded(self, num_tokens: int) -> int:
        """The prompt length that was prepared for so many tokens."""
        return next(length for length in self.fused.settings.prompt_lengths if length >= num_tokens)

    # -- requests to rows: any thread ----------------------------------------------------------------------------------

    def chunk_row(self, row: Row, gate: int = 0, owner: str = "") -> ChunkRow:
        """InvalidInput where the policy refuses the observation.

        Args:
            gate: That its pictures came through.
            owner: Whose questions may be about the same pictures.
        """
        sample = sample_of(row.sample)
        made = self._ahead.take(inputs_of(row))
        if made is None:
            made = self._without_pictures(row)
        else:
            samples.check([sample], self.policy.spec)  # Of its pictures nothing was known.
        made.asked, made.pictures, made.gate, made.owner = row, self._pictures.of(sample), gate, owner
        return made

    def expect(self, row: Row) -> None:
        """Prepares all of a row but its pictures, before it comes with them."""
        try:
            self._ahead.put(inputs_of(row), self._without_pictures(row))
        except Exception as error:  # The row itself says so, to whom it concerns.
            logger.debug("a row cannot be prepared ahead: %s", error)

    def _without_pictures(self, row: Row) -> ChunkRow:
        # The version first: replace() changes it last, so whatever is read of two versions looks old.
        version, policy = self.version, self.policy
        read, start = self._read_by(policy, row)
        return ChunkRow(read=read, pictures=(), asked=row, version=version, start=start)

    def _read_by(self, policy: Pi052Policy, row: Row) -> tuple[Read, ChunkStart]:
        """What its chunk is made of, pictures apart, with the statistics of that policy."""
        read = policy.observation(sample_of(row.sample))
        start = ChunkStart.of(
            policy.draw_noise([row.seed])[0],
            committed=_anchored(policy, row, read),
            delay_steps=row.delay_steps,
            execution_horizon=row.execution_horizon,
            schedule=self.fused.settings.schedule,
            trained_max_delay=self.fused.settings.trained_max_delay,
        )
        return read, start

    def text_row(self, observed: Observed, request: TextRequest, owner: str = "") -> TextRowInWork:
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
            pictures=self._pictures.of(sample),
            rules=rules,
            pieces=Pieces(policy.prompter),
            generator=torch.Generator().manual_seed(request.seed),
            draft=self._draft(request),
            owner=owner,
        )

    def _draft(self, request: TextRequest) -> Sequence[int]:
        """The previous subtask, where greedy decoding may well say it again."""
        policy = self.policy
        if request.kind is not TextKind.SUBTASK or not request.previous_text or request.temperature > 0:
            return ()
        assert policy.prompter is not None
        tokens = policy.prompter.answer(request.previous_text)
        return tokens[: self.fused.settings.draft_length]

    # -- units: the engine's thread ------------------------------------------------------------------------------------

    @property
    def runs_ahead(self) -> bool:
        """Whether units are launched and run while the host goes on."""
        return self.device.type == "cuda"

    def launched(self, launch: Callable[[], None]) -> Callable[[], float]:
        """See launches.timed()."""

        def began() -> torch.cuda.Event | None:
            self._began = None
            launch()
            return self._began

        return launches.timed(self.device, began)

    def see_ahead(self, gate: int) -> None:
        """See FusedPictures."""
        self._pictures.see_ahead(gate)

    def run_prefix(self, rows: Sequence[ChunkRow]) -> None:
        """Takes a slot for each row. One that was read with an older version's statistics is read again."""
        for row in rows:
            if row.version is not self.version:
                again = self._without_pictures(row.asked)
                row.read, row.start, row.version = again.read, again.start, again.version
            row.slot = self._take_slot()
        tokens, self._began = self._pictures.see(rows)
        kept = self.fused.prefix([
            PrefixRow(slot=slot_of(row), picture_tokens=seen, picture_valid=valid_of(row), tokens=row.read.prompt.tokens)
            for row, seen in zip(rows, tokens.view(len(rows), -1, tokens.shape[-1]), strict=True)
        ])  # fmt: skip
        self.fused.begin_chunks([(slot_of(row), row.start) for row in rows])
        # Last: the device is at the prefix, and nobody waits for this.
        self._pictures.keep(rows, kept)

    def rehearse_prefix(self, row: ChunkRow) -> None:
        """What run_prefix() does on the host when pictures are seen already, and none of the device's long work; see
        EnginePort.rehearse.
        """
        self.fused.rehearse_prefix(valid_of(row), row.read.prompt.tokens, row.start)

    def run_expert(self, rows: Sequence[tuple[ChunkRow, int]]) -> None:
        """An Euler step of each row, which is at its own."""
        self.fused.expert_step([(slot_of(row), step) for row, step in rows])

    def run_text_prefix(self, row: TextRowInWork) -> Take:
        """The next slice of a question's prefix; the last gives the first token of its answer.

        The first takes a slot, where the row has none from a prefix that begins again. Where the owner's chunks had the same
        pictures it is the first behind those of vision.
        """
        if row.num_slices == 0:
            row.slot = self._take_slot() if row.slot is None else row.slot
            valid, tokens = valid_of(row), row.read.prompt.tokens
            seen = self._pictures.find(row.owner, row.pictures)
            if seen is None:
                self.fused.begin_question(row.slot, self._pictures.fitting(row.pictures), valid, tokens)
            else:
                self.fused.begin_seen_question(row.slot, seen, valid, tokens)
                row.num_slices = self.fused.num_vision_slices
            row.num_foretold = 0
        return self._texts.run_prefix(row)

    def run_draft(self, row: TextRowInWork) -> Take:
        """See FusedTexts; likewise below."""
        return self._texts.run_draft(row)

    def run_text(self, rows: Sequence[TextRowInWork]) -> Take:
        return self._texts.run_step(rows)

    def fetch(self, rows: Sequence[ChunkRow]) -> Callable[[], list[Chunk]]:
        """Sends finished chunks to the host; what is answered makes the robots' chunks of them, when they have arrived."""
        made = [launches.to_host(self.slots.actions[slot_of(row)]) for row in rows]
        # They travel behind the unit: that it is done does not say that they are here, and what was in this memory before
        # is some robot's chunk.
        wait = launches.arrival(self.device) if rows else nothing

        def chunks() -> list[Chunk]:
            wait()
            return [self._chunk(row, actions.numpy()[None]) for row, actions in zip(rows, made, strict=True)]

        return chunks

    def rehearsed(self, row: ChunkRow) -> Chunk:
        """What fetch() ends with, of numbers that mean nothing: see Rehearsal."""
        return self._chunk(row, np.zeros((1, *self.slots.actions.shape[1:]), dtype=np.float32))

    def _chunk(self, row: ChunkRow, made: npt.NDArray[np.float32]) -> Chunk:
        # In NumPy: tensors let go of the interpreter at every step, and the engine's thread has it then.
        actions, carried = self.policy.finished(made, row.read.state.numpy())
        return actions[0], carried[0]

    def release(self, row: ChunkRow | TextRowInWork, *, wipe: bool = False) -> None:
        """Gives the slot back. wipe: It holds numbers that are not finite, or may: nobody looked."""
        if row.slot is not None:
            if wipe:
                self.slots.wipe(row.slot)
            self.fused.give_up_question(row.slot)
            self.slots.give_back(row.slot)
            row.slot = None

    def rehearse_stage(self) -> None:
        """Stages the weights that serve, before anybody is served, on the thread that versions will come by.

        What happens the first time only (memory of the device, of its own for a stream; handles of libraries, of their own
        for a thread) holds the driver, and with it every unit's launch.
        """
        self.stage(self.policy)

    def forget_stage(self) -> None:
        """Gives back the memory that stage() took."""
        self.fused.weights.free_spare()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def stage(self, policy: AnyPolicy) -> None:
        """Brings another version's weights beside those that serve, from any thread, and tries them; replace() makes them
        serve.

        Raises:
            InvalidInput: A tensor is missing or has another shape.
            Refused: The version's canary chunk is not finite.
        """
        assert isinstance(policy, Pi052Policy)
        self.fused.weights.stage(policy.network.state_dict())
        asked = canary_row(policy)
        read, start = self._read_by(policy, asked)
        with self.fused.weights.aside():
            pictures = self._pictures.on_device(self._pictures.of(sample_of(asked.sample)))
        tokens, steps = read.prompt.tokens, self._canary_steps
        made = trial.staged_chunk(self.fused.units, pictures, tokens, start, steps, length=self._padded(len(tokens)))
        if not all(np.isfinite(part).all() for part in policy.finished(made.numpy()[None], read.state.numpy())):
            raise Refused("its canary chunk is not finite")

    def replace(self, policy: AnyPolicy, version: common_pb2.PolicyVersion, digests: Mapping[str, bytes]) -> AnyPolicy:
        """As ServedModel's, of what was staged last."""
        self.fused.weights.commit()
        self._pictures.forget()
        self.wait()
        previous = super().replace(policy, version, digests)
        self._ahead.clear()  # Made with the statistics of before.
        return previous

    def canary(self) -> npt.NDArray[np.float32]:
        """(T, R) for a plain observation, after some of its steps: what is no number in one of them stays none."""
        row = self.chunk_row(canary_row(self.policy))
        is_finite = False
        try:
            self.run_prefix([row])
            for step in self._canary_steps:
                self.run_expert([(row, step)])
            arrived = self.fetch([row])
            self.wait()
            [(chunk, _)] = arrived()
            is_finite = bool(np.isfinite(chunk).all())
        finally:
            self.release(row, wipe=not is_finite)
        return chunk

    @property
    def _canary_steps(self) -> Sequence[int]:
        return sorted({0, self.num_steps // 2, self.num_steps - 1})

    def wait(self) -> None:
        """Until the device has done what was asked."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _take_slot(self) -> int:
        slot = self.slots.take()
        assert slot is not None, "the scheduler keeps no more rows in work than there are slots"
        return slot


def sample_of(observed: Observed) -> Sample:
    return Sample(observation=observed.observation, task=observed.task)


def can_be_fused(policy: AnyPolicy) -> bool:
    """Whether the fast path knows this policy. Its prefix is one block: a subtask inside an acting prompt (joint) is not."""
    if not isinstance(policy, Pi052Policy) or policy.config.prompts.joint:
        return False
    return policy.config.network.language.kv_heads == 1


def _anchored(policy: Pi052Policy, row: Row, read: Read) -> torch.Tensor | None:
    if row.prefix is None:
        return None
    # A copy: what comes through a slot is writable, what comes from a client's message is not, and torch warns of that.
    return policy.anchored_actions(torch.from_numpy(np.array(row.prefix))[None], read.state)[0]
