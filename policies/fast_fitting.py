"""Fits the FAST tokenizer to a data set, accepts it only if it reconstructs chunks it has not seen, and keeps it by content.

The chunks are those training sees: relative where the policy is, normalised, not clipped. One rank fits, the others wait for
the finished folder; so do other runs on the same data.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from manyhands.errors import InvalidInput, TooLate

from . import fast
from .fast import FastTokenizer, Floats

logger = logging.getLogger(__name__)

_SEED = 42
# A dimension that moves less than this (normalised) is constant: its error says nothing.
_CONSTANT_STD = 1e-6
# Part of every key: raise it when the same chunks would be fitted differently.
_FORMAT = 1


class ChunkSource(Protocol):
    """Episodes of a data set."""

    @property
    def episode_lengths(self) -> list[int]: ...

    def chunk(self, episode: int, start: int, horizon: int) -> tuple[Floats, Floats]:
        """(T, D) actions from start on and the (S,) state at start, in the robot's units."""


# (T, D) actions and (S,) state in the robot's units to (T, D) as the policy's loss sees them.
ToModelSpace = Callable[[Floats, Floats], Floats]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """Attributes:
    num_samples, num_validation: Chunks to fit on, and to accept by.
    max_rmse: Over all numbers of the validation chunks, normalised.
    max_dim_rmse: Of the worst dimension that is not constant.
    """

    num_samples: int = 1024
    num_validation: int = 256
    max_rmse: float = 0.10
    max_dim_rmse: float = 0.20
    scale: float = 10.0
    vocab_size: int = 1024

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:
                raise InvalidInput(f"is {getattr(self, name)}, must be > 0", field=name)


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Attributes:
    rmse: Over all numbers.
    dim_rmse: (D,), 0 where a dimension is constant.
    mean_codes: Per chunk.
    """

    rmse: float
    dim_rmse: npt.NDArray[np.float64]
    mean_codes: float


def fit(source: ChunkSource, horizon: int, to_model_space: ToModelSpace, settings: FitSettings) -> FastTokenizer:
    """A tokenizer that reconstructs the data set's chunks.

    Raises:
        InvalidInput: Too little data, or the reconstruction is outside the limits; names the dimension.
    """
    chunks = draw_chunks(source, horizon, to_model_space, settings.num_samples + settings.num_validation)
    if len(chunks) < 2:
        raise InvalidInput(
            f"{len(chunks)} chunks of {horizon} steps: no episode is long enough; record more, or shorten the horizon",
            field="dataset",
        )
    # A small data set gives fewer chunks: the same share of them validates.
    share = settings.num_validation / (settings.num_samples + settings.num_validation)
    num_validation = min(settings.num_validation, max(1, round(len(chunks) * share)))
    tokenizer = fast.fit(chunks[:-num_validation], scale=settings.scale, vocab_size=settings.vocab_size)
    found = reconstruction(tokenizer, chunks[-num_validation:])
    logger.info("FAST: rmse %.4f, worst dimension %.4f, %.1f codes", found.rmse, found.dim_rmse.max(), found.mean_codes)
    worst = int(found.dim_rmse.argmax())
    if found.rmse > settings.max_rmse:
        raise InvalidInput(_refusal(f"rmse {found.rmse:.4f}", settings.max_rmse), field="max_rmse")
    if found.dim_rmse[worst] > settings.max_dim_rmse:
        raise InvalidInput(
            _refusal(f"rmse {found.dim_rmse[worst]:.4f} of dimension {worst}", settings.max_dim_rmse), field="max_dim_rmse"
        )
    return tokenizer


def _refusal(what: str, limit: float) -> str:
    return (
        f"the fitted FAST tokenizer has {what} on chunks it has not seen, the limit is {limit}; give it more samples, "
        "a larger scale, or check the normalisation"
    )


def draw_chunks(source: ChunkSource, horizon: int, to_model_space: ToModelSpace, count: int) -> Floats:
    """(N, T, D), N at most count: the same share from every episode, the same ones every time."""
    lengths = source.episode_lengths
    rng = np.random.default_rng(_SEED)
    per_episode = math.ceil(count / max(len(lengths), 1))
    chunks: list[Floats] = []
    for episode in rng.permutation(len(lengths)).tolist():
        if lengths[episode] < horizon:
            continue
        for start in rng.integers(0, lengths[episode] - horizon + 1, size=per_episode).tolist():
            if len(chunks) < count:
                chunks.append(to_model_space(*source.chunk(episode, start, horizon)))
    return np.stack(chunks) if chunks else np.zeros((0, horizon, 0))


def reconstruction(tokenizer: FastTokenizer, chunks: Floats) -> Reconstruction:
    """What is left of (N, T, D) chunks after encoding and decoding."""
    codes = [tokenizer.encode(chunk) for chunk in chunks]
    decoded = np.stack([tokenizer.decode(row) for row in codes])
    squared = (decoded.astype(np.float64) - chunks) ** 2
    moves = chunks.reshape(-1, chunks.shape[-1]).std(axis=0) > _CONSTANT_STD
    return Reconstruction(
        rmse=float(np.sqrt(squared.mean())),
        dim_rmse=np.where(moves, np.sqrt(squared.mean(axis=(0, 1))), 0.0),
        mean_codes=float(np.mean([len(row) for row in codes])),
    )


# -- the cache ---------------------------------------------------------------------------------------------------------


def content_key(facts: Mapping[str, Any]) -> str:
    """16 hex digits of everything the fit depends on: data set, revision, episodes, sizes, normalisation, statistics,
    relative mask, FitSettings. Values are JSON, NumPy arrays, or mappings of them."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic):
            return value.tolist()
        raise TypeError(f"{type(value).__name__} cannot be part of a cache key")

    text = json.dumps({"format": _FORMAT, **facts}, sort_keys=True, default=plain, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cached(
    folder: Path,
    key: str,
    make: Callable[[], FastTokenizer],
    *,
    is_leader: bool = True,
    timeout_s: float = 1800.0,
    poll_s: float = 0.2,
) -> tuple[FastTokenizer, Path]:
    """The tokenizer kept under key and its folder; made by the leader if there is none. All ranks read the same files.

    Several leaders (other runs on the same data) may make it at once: the first whole one stays.

    Args:
        is_leader: One rank of a run; the others wait.
        timeout_s: So long the others wait; if the leader fails its run ends, and they with it.

    Raises:
        TooLate: The leader has not made it in time.
    """
    place = folder / key
    if is_leader and not place.is_dir():
        unfinished = folder / f".{key}.{uuid.uuid4().hex[:8]}.unfinished"
        try:
            tokenizer = make()
            unfinished.mkdir(parents=True)
            tokenizer.save(unfinished)
            try:
                unfinished.rename(place)  # Refused where a whole one stands.
            except OSError:
                if not place.is_dir():
                    raise
            _sync(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    deadline = time.monotonic() + timeout_s
    while not place.is_dir():
        if time.monotonic() >= deadline:
            raise TooLate(f"no FAST tokenizer at {place} after {timeout_s:g} s; look at the log of rank 0", field="fast")
        time.sleep(poll_s)
    return FastTokenizer.load(place), place


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
