"""Samples as callers bring them: what is wrong with one is said here, before it meets a tokenizer or a kernel.

Shapes: B samples, S state size, H horizon, R action size of the robot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from manyhands.errors import InvalidInput
from manyhands.spec import Feature, Spec

from .policy import Sample

# Far beyond any prompt; a tokenizer needs seconds for a text of a megabyte, to be told that it is too long.
MAX_TEXT_CHARACTERS = 1 << 16


def check(samples: Sequence[Sample], spec: Spec) -> None:
    """What every policy asks of all samples: there are some, their tasks are text, their pictures are of cameras it knows.

    A vector that the spec does not name is not looked at. A camera that it does not name is an error: a misspelt vector is
    missing, and that is told, but the place of a misspelt camera would be masked without a word.
    """
    if not samples:
        raise InvalidInput("are none; give at least one", field="samples")
    known = {feature.name for feature in spec.observation}
    for sample in samples:
        for name, value in sample.observation.items():
            if name not in known and np.ndim(value) != 1:
                cameras = ", ".join(feature.name for feature in spec.images) or "none"
                raise InvalidInput(
                    f"is no camera of this policy; its cameras: {cameras}. Rename it or leave it out", field=name
                )
        check_text(sample.task, "task")
        if sample.annotations is not None and not isinstance(sample.annotations, Mapping):
            kind = type(sample.annotations).__name__
            raise InvalidInput(f"is of type {kind}, must map persistent and events to rows", field="annotations")


def check_text(text: object, field: str) -> str:
    """text, which may be empty and hold control characters: a tokenizer takes those."""
    if not isinstance(text, str):
        raise InvalidInput(f"is {text!r:.80} of type {type(text).__name__}, must be text", field=field)
    if len(text) > MAX_TEXT_CHARACTERS:
        raise InvalidInput(f"has {len(text)} characters, at most {MAX_TEXT_CHARACTERS}; shorten it", field=field)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"holds half a surrogate pair, {text[error.start]!r}, at {error.start}, which is no character; decode it anew",
            field=field,
        ) from None
    return text


def states(samples: Sequence[Sample], features: Sequence[Feature]) -> npt.NDArray[np.float32]:
    """(B, S): the features one after the other; InvalidInput names one that is missing, misshapen or not finite."""
    return np.array([_state(sample, features) for sample in samples], dtype=np.float32)


def _state(sample: Sample, features: Sequence[Feature]) -> npt.NDArray[np.float32]:
    parts: list[npt.NDArray[np.float32]] = []
    for feature in features:
        if feature.name not in sample.observation:
            raise InvalidInput(f"is missing from the observation; it is {feature.shape} {feature.dtype}", field=feature.name)
        value = sample.observation[feature.name]
        if not isinstance(value, np.ndarray):
            kind = type(value).__name__
            raise InvalidInput(
                f"is of type {kind}, must be a NumPy array {feature.shape} {feature.dtype}", field=feature.name
            )
        feature.check(value)
        parts.append(_narrowed(value, feature))
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([np.zeros(0, dtype=np.float32), *parts])


def _narrowed(value: npt.NDArray[np.generic], feature: Feature) -> npt.NDArray[np.float32]:
    """value, finite; itself where it is float32."""
    with np.errstate(over="ignore"):
        narrow = value.astype(np.float32, copy=False)
    if narrow is not value and not np.isfinite(narrow).all():
        raise InvalidInput(f"holds {value[~np.isfinite(narrow)][0]}, which float32 cannot hold", field=feature.name)
    return narrow


def actions(samples: Sequence[Sample], horizon: int, size: int) -> npt.NDArray[np.float32] | None:
    """(B, H, R), or None where no sample has any; InvalidInput where only some have, or what they have cannot be."""
    given = [sample.actions for sample in samples if sample.actions is not None]
    if not given:
        return None
    if len(given) != len(samples):
        raise InvalidInput(f"{len(given)} of {len(samples)}: some samples have actions and some have not", field="actions")
    expected = (horizon, size)
    for chunk in given:
        if not isinstance(chunk, np.ndarray) or chunk.shape != expected or chunk.dtype.kind != "f":
            raise InvalidInput(f"is {_form(chunk)}, must be {expected} float32", field="actions")
        finite = np.isfinite(chunk)
        if not finite.all():
            step, element = (int(index) for index in np.argwhere(~finite)[0])
            raise InvalidInput(
                f"is {chunk[step, element]} at step {step}, element {element}; it must be finite", field="actions"
            )
    return np.stack(given).astype(np.float32)


def is_pad(samples: Sequence[Sample], horizon: int) -> npt.NDArray[np.bool_]:
    """(B, H); a sample without flags has no step beyond its episode's end."""
    none = np.zeros(horizon, dtype=np.bool_)
    given = [none if sample.is_pad is None else sample.is_pad for sample in samples]
    for flags in given:
        if not isinstance(flags, np.ndarray) or flags.shape != (horizon,) or flags.dtype != np.bool_:
            raise InvalidInput(f"is {_form(flags)}, must be ({horizon},) bool", field="is_pad")
    return np.stack(given)


def _form(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.shape} {value.dtype.name}"
    return f"of type {type(value).__name__}"
