"""How long a model's prepared units take, measured before the first robot comes, so that what it is promised can be kept."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from policies.policy import TextKind, TextRequest
from policies.prompted import Read

from . import sharing
from .capacity import DeviceCapacity
from .engine import canary_row
from .fused_model import FusedModel
from .rows_in_work import ChunkRow, TextRowInWork
from .service_times import ServiceTimes
from .units import UnitKind, group

RUNS = 5
RowT = TypeVar("RowT", ChunkRow, TextRowInWork)


def measure(name: str, model: FusedModel, times: ServiceTimes, now_s: float) -> DeviceCapacity:
    """Runs every unit a few times and tells times of them; answers what the device makes of the longest prompts."""
    settings = model.fused.settings
    for bucket in settings.prompt_lengths:
        for size in settings.prefix_rows:
            if size <= settings.expert_rows[-1]:
                prefix_s = _fastest_s(model, [_example_row(model, bucket) for _ in range(size)], model.run_prefix)
                times.observe(group(UnitKind.PREFIX, name, bucket), size, prefix_s, now_s)
    for size in settings.expert_rows:
        step_s = _step_s(model, size)
        for bucket in settings.prompt_lengths:
            times.observe(group(UnitKind.EXPERT, name, bucket), size, step_s, now_s)
    question_s = _measure_text(name, model, times, now_s) if model.policy.has_text_head else 0.0
    return capacity_of(name, model, times, question_s)


def _measure_text(name: str, model: FusedModel, times: ServiceTimes, now_s: float) -> float:
    """Answers how long the whole prefix of the longest question takes."""
    settings = model.fused.settings
    slices_s = [0.0]
    for bucket in settings.prompt_lengths:
        slices_s = _slices_s(model, bucket)
        # Slices share an estimate, and a chunk may have to wait for any of them.
        times.observe(group(UnitKind.TEXT_PREFIX, name, bucket), 1, max(slices_s), now_s)
    for size in settings.text_rows:
        token_s = _token_s(model, size)
        for bucket in settings.prompt_lengths:
            times.observe(group(UnitKind.TEXT, name, bucket), size, token_s, now_s)
            if size == 1:
                # Some tokens in one pass: as long as two steps, until one has been seen.
                times.observe(group(UnitKind.DRAFT_CHECK, name, bucket), 1, 2 * token_s, now_s)
    return sum(slices_s)


def capacity_of(name: str, model: FusedModel, times: ServiceTimes, question_s: float) -> DeviceCapacity:
    """Of the longest prompts; times knows every prepared unit.

    Args:
        question_s: Of the whole prefix of a question.
    """
    settings = model.fused.settings
    bucket = settings.prompt_lengths[-1]

    def took_s(kind: UnitKind, size: int = 1) -> float:
        known_s = times.mean_s(group(kind, name, bucket), size)
        assert known_s is not None, "every prepared unit was measured"
        return known_s

    rate = sharing.chunks_per_s(
        prefix_s=took_s(UnitKind.PREFIX),
        step_s=lambda rows: times.likely_s(group(UnitKind.EXPERT, name, bucket), rows, 0.0),
        num_steps=model.num_steps,
        max_rows=settings.expert_rows[-1],
    )
    if not model.policy.has_text_head:
        return DeviceCapacity(chunks_per_s=rate)
    max_texts = settings.text_rows[-1]
    check_s = took_s(UnitKind.DRAFT_CHECK) if settings.draft_length else 0.0
    return DeviceCapacity(
        chunks_per_s=rate,
        question_s=question_s + check_s,
        text_step_s=took_s(UnitKind.TEXT, max_texts),
        max_texts=max_texts,
    )


def _step_s(model: FusedModel, size: int) -> float:
    """Of an Euler step of so many rows."""
    rows = [_example_row(model, model.fused.settings.prompt_lengths[0]) for _ in range(size)]
    for row in rows:
        model.run_prefix([row])
    step_s = _fastest_s(model, rows[:0], lambda _: model.run_expert([(row, 0) for row in rows]))
    for row in rows:
        model.release(row)
    return step_s


def _token_s(model: FusedModel, size: int) -> float:
    """Of a token of so many texts."""
    rows = [_example_question(model, model.fused.settings.prompt_lengths[0]) for _ in range(size)]
    for row in rows:
        for _ in range(model.num_prefix_slices):
            model.run_text_prefix(row)
    token_s = _fastest_s(model, rows[:0], lambda _: model.run_text(rows))
    for row in rows:
        model.release(row)
    return token_s


def _slices_s(model: FusedModel, bucket: int) -> list[float]:
    """Of the slices of a question's prefix."""
    fastest_s = [float("inf")] * model.num_prefix_slices
    for _ in range(RUNS):
        row = _example_question(model, bucket)
        for at in range(model.num_prefix_slices):
            model.wait()
            started_s = time.perf_counter()
            model.run_text_prefix(row)
            model.wait()
            fastest_s[at] = min(fastest_s[at], time.perf_counter() - started_s)
        model.release(row)
    return fastest_s


def _fastest_s(model: FusedModel, rows: Sequence[RowT], run: Callable[[Sequence[RowT]], object]) -> float:
    """Of a few runs; the rows' slots are given back after each."""
    fastest_s = float("inf")
    for _ in range(RUNS):
        model.wait()
        started_s = time.perf_counter()
        run(rows)
        model.wait()
        fastest_s = min(fastest_s, time.perf_counter() - started_s)
        for row in rows:
            model.release(row)
    return fastest_s


def _example_row(model: FusedModel, bucket: int) -> ChunkRow:
    """With a prompt of so many tokens."""
    row = model.chunk_row(canary_row(model.policy))
    return dataclasses.replace(row, read=_stretched(row.read, bucket))


def _example_question(model: FusedModel, bucket: int) -> TextRowInWork:
    row = model.text_row(canary_row(model.policy).sample, TextRequest(kind=TextKind.SUBTASK))
    return dataclasses.replace(row, read=_stretched(row.read, bucket))


def _stretched(read: Read, length: int) -> Read:
    tokens = np.resize(read.prompt.tokens, length)
    return dataclasses.replace(read, prompt=dataclasses.replace(read.prompt, tokens=tokens))
