"""FAST: an action chunk as a few tokens (Pertsch et al., arXiv 2501.09747).

Cosine transform over time, scale and round, one character per coefficient (time by time, dimension by dimension), byte-pair
encoding. The tokenizer is trained on the robot's own chunks: fast_fitting.py does that for a data set.

Shapes: N chunks, T steps, D numbers of an action, normalised.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from manyhands.errors import Corrupt, InvalidInput, NotFound

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.floating[Any]]

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "processor_config.json"
# transformers 5 looks for the inner tokenizer in a folder of its own.
_TOKENIZER_PLACES = (TOKENIZER_FILE, f"bpe_tokenizer/{TOKENIZER_FILE}")
_CONFIG_PLACES = (CONFIG_FILE, "preprocessor_config.json")

MAX_COEFFICIENT_RANGE = 1024
_MAX_TOKEN_LENGTH = 10_000
_NUM_ASCII = 128
# Beyond it stand halves of surrogate pairs, which no tokenizer takes.
_LAST_CHARACTER = 0xD7FF
_LARGEST = 2.0**53


@dataclass(frozen=True, kw_only=True)
class FastConfig:
    """Attributes:
    scale: Coefficients are rounded to 1 / scale.
    vocab_size: Codes, at most.
    min_token: The smallest coefficient that has a character of its own; smaller ones are raised to it.
    time_horizon, action_dim: Of the chunks, T and D; None: of any, and decode() must be told.
    """

    scale: float = 10.0
    vocab_size: int = 1024
    min_token: int = 0
    time_horizon: int | None = None
    action_dim: int | None = None


class FastTokenizer:
    """Raises InvalidInput for chunks of another shape."""

    def __init__(self, bpe: Tokenizer, config: FastConfig) -> None:
        self.config = config
        self._bpe = bpe
        self._num_codes = bpe.get_vocab_size()

    def encode(self, actions: Floats) -> list[int]:
        """Codes from 0 of one (T, D) chunk; InvalidInput for numbers so large that a code has no character for them."""
        coefficients = self.coefficients(actions)
        characters = np.maximum(coefficients.reshape(-1) - self.config.min_token, 0)
        if characters.max() > _LAST_CHARACTER:
            raise InvalidInput(
                f"reach {float(np.abs(actions).max()):.4g} once normalised, too far out for FAST; look at their statistics "
                "(a number that never changed has a range of zero), or leave the sample out",
                field="actions",
            )
        codes: list[int] = self._bpe.encode("".join(map(chr, characters.tolist())), add_special_tokens=False).ids
        return codes

    def coefficients(self, actions: Floats) -> npt.NDArray[np.int64]:
        """(T, D) rounded coefficients of one chunk, halves to the even neighbour."""
        self._check(actions)
        return rounded_coefficients(actions, self.config.scale)

    def decode(
        self, codes: Sequence[int], *, time_horizon: int | None = None, action_dim: int | None = None
    ) -> npt.NDArray[np.float32]:
        """(T, D) float32; zeros where codes are not those of a whole chunk, as generated ones may be."""
        num_steps, size = time_horizon or self.config.time_horizon, action_dim or self.config.action_dim
        if num_steps is None or size is None:
            raise InvalidInput("must be given: the tokenizer is for chunks of any shape", field="time_horizon, action_dim")
        text = self._text(codes)
        if len(text) != num_steps * size:
            logger.debug("%d FAST codes give %d numbers, not %d x %d", len(codes), len(text), num_steps, size)
            return np.zeros((num_steps, size), dtype=np.float32)
        values = np.array([ord(character) for character in text], dtype=np.float64) + self.config.min_token
        coefficients = values.reshape(num_steps, size) / self.config.scale
        return (cosine_transform(num_steps).T @ coefficients).astype(np.float32)

    def _text(self, codes: Sequence[int]) -> str:
        """A character per coefficient, or nothing."""
        if not all(0 <= code < self._num_codes for code in codes):
            return ""
        text: str = self._bpe.decode(list(codes), skip_special_tokens=False)
        # Half a character would come out as this one: a huge coefficient.
        return "" if "\ufffd" in text else text

    def save(self, folder: Path) -> None:
        """Two files into an existing folder, named as FAST tokenizers are published."""
        for name, content in zip((TOKENIZER_FILE, CONFIG_FILE), self.contents(), strict=True):
            with (folder / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    def contents(self) -> tuple[bytes, bytes]:
        """Of the two files, for parse()."""
        config = {name: getattr(self.config, name) for name in FastConfig.__dataclass_fields__}
        return self._bpe.to_str(pretty=True).encode(), (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def load(cls, folder: Path) -> FastTokenizer:
        """Raises NotFound, or Corrupt for files that cannot be read; no code of the folder is run."""
        contents = [_first_of(folder, places).read_bytes() for places in (_TOKENIZER_PLACES, _CONFIG_PLACES)]
        return cls.parse(*contents, source=str(folder))

    @classmethod
    def parse(cls, tokenizer: bytes, config: bytes, *, source: str) -> FastTokenizer:
        """Of the contents of the two files; Corrupt, naming source, where they are something else."""
        try:
            return cls(Tokenizer.from_buffer(tokenizer), parse_config(json.loads(config)))
        except InvalidInput:
            raise
        except Exception as error:  # The tokenizers library raises nothing narrower.
            raise Corrupt(f"{source} holds no FAST tokenizer: {error}", field="action_tokenizer") from None

    def _check(self, actions: Floats) -> None:
        config = self.config
        expected = (config.time_horizon, config.action_dim)
        if actions.ndim != 2 or any(want not in (None, have) for want, have in zip(expected, actions.shape, strict=True)):
            raise InvalidInput(
                f"have shape {actions.shape}, the FAST tokenizer was fitted on chunks of {expected}; fit it on this data",
                field="actions",
            )


def parse_config(values: Any) -> FastConfig:
    """Of processor_config.json; keys of the library that wrote it are left out."""
    if not isinstance(values, dict):
        raise InvalidInput(f"is {values!r}, must be an object", field=CONFIG_FILE)
    given = {name: values[name] for name in FastConfig.__dataclass_fields__ if name in values}
    for name, value in given.items():
        is_optional = name in ("time_horizon", "action_dim")
        if value is None and is_optional:
            continue
        is_number = isinstance(value, int | float if name == "scale" else int) and not isinstance(value, bool)
        if not is_number or (name != "min_token" and value <= 0):
            raise InvalidInput(f"is {value!r}, must be a {'positive ' if name != 'min_token' else ''}number", field=name)
    return FastConfig(**given)


def fit(chunks: Floats, *, scale: float = 10.0, vocab_size: int = 1024) -> FastTokenizer:
    """A tokenizer for chunks like these (N, T, D).

    Raises:
        InvalidInput: No chunks, numbers that are not finite, or coefficients over too wide a range.
    """
    if chunks.ndim != 3 or not chunks.size:
        raise InvalidInput(f"have shape {chunks.shape}; (N, T, D) with at least one chunk is needed", field="chunks")
    if not np.isfinite(chunks).all():
        raise InvalidInput("hold a NaN or infinity", field="chunks")
    coefficients = rounded_coefficients(chunks, scale)
    lowest, highest = int(coefficients.min()), int(coefficients.max())
    if highest - lowest > MAX_COEFFICIENT_RANGE:
        raise InvalidInput(
            f"have coefficients from {lowest} to {highest}, over {MAX_COEFFICIENT_RANGE} apart: some actions "
            "lie far outside the normalised range; look at the statistics, or at outliers in the data",
            field="chunks",
        )
    texts = ["".join(map(chr, row.tolist())) for row in (coefficients - lowest).reshape(len(chunks), -1)]

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    # Every byte that a coefficient near this range can take has a code of its own: later chunks may hold values that these
    # do not, and a byte without a code would be dropped and shift all that follow.
    reachable = "".join(map(chr, range(max(_NUM_ASCII, highest - lowest + 1))))
    alphabet = sorted({piece for word, _ in bpe.pre_tokenizer.pre_tokenize_str(reachable) for piece in word})
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=alphabet,
        max_token_length=_MAX_TOKEN_LENGTH,
    )
    bpe.train_from_iterator(texts, trainer=trainer, length=len(texts))
    config = FastConfig(
        scale=scale,
        vocab_size=vocab_size,
        min_token=lowest,
        time_horizon=chunks.shape[1],
        action_dim=chunks.shape[2],
    )
    return FastTokenizer(bpe, config)


def rounded_coefficients(actions: Floats, scale: float) -> npt.NDArray[np.int64]:
    """(..., T, D) int64."""
    transformed = cosine_transform(actions.shape[-2]) @ np.asarray(actions, dtype=np.float64)
    # Beyond int64 they would come out as other numbers.
    return np.rint(transformed * scale).clip(-_LARGEST, _LARGEST).astype(np.int64)


def cosine_transform(num_steps: int) -> npt.NDArray[np.float64]:
    """(T, T): the orthonormal DCT-II; its transpose goes back."""
    frequency = np.arange(num_steps)[:, None]
    matrix: npt.NDArray[np.float64] = np.cos(math.pi / num_steps * (np.arange(num_steps) + 0.5) * frequency) * math.sqrt(
        2.0 / num_steps
    )
    matrix[0] /= math.sqrt(2.0)
    return matrix


def _first_of(folder: Path, places: Sequence[str]) -> Path:
    for place in places:
        if (folder / place).is_file():
            return folder / place
    raise NotFound(f"{folder} is no FAST tokenizer: it has none of {', '.join(places)}", field="action_tokenizer")
