"""Pictures as the large policies take them: resized with their ratio kept, padded, in [-1, 1].

Shapes: B rows, h x w pixels as they come, height x width as the model takes them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from manyhands.errors import InvalidInput


class Padding(enum.Enum):
    """Where the bars go that fill up the ratio."""

    CENTRED = "centred"  # pi05 and pi052; an odd pixel goes right or below. Resized values are cut to [0, 1].
    LEFT_TOP = "left_top"  # SmolVLA.


# As float32 a picture of that many takes 800 MB; no camera has more.
MAX_PIXELS = 1 << 26
# What a missing camera is filled with; black, after scaling. Its tokens are masked.
MISSING_VALUE = -1.0


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Attributes:
    names: Of the cameras, those that are there first, C of them.
    values: Per camera (B, 3, height, width) float32 in [-1, 1].
    valid: Per camera (B,) bool.
    """

    names: tuple[str, ...]
    values: tuple[torch.Tensor, ...]
    valid: tuple[torch.Tensor, ...]


def check(picture: object, *, field: str) -> npt.NDArray[np.uint8]:
    """The picture of a camera as it comes, (h, w, 3) uint8 RGB of any size; InvalidInput says what else it is.

    The last axis is the colours, whatever the first one is: (3, w, 3) is a picture of three rows. That red comes first
    cannot be seen.
    """
    if not isinstance(picture, np.ndarray):
        raise InvalidInput(
            f"is of type {type(picture).__name__}, must be a NumPy array (height, width, 3) uint8", field=field
        )
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not 0 < picture.size <= 3 * MAX_PIXELS:
        raise InvalidInput(_fault(picture), field=field)
    return picture


def _fault(picture: npt.NDArray[np.generic]) -> str:
    """What is wrong with an array that is no camera's picture; put into words only then, as every picture is checked."""
    form = f"is {picture.shape} {picture.dtype.name}; a camera is (height, width, 3) uint8 RGB"
    if picture.ndim != 3 or picture.shape[2] != 3:
        return f"{form}. {_remedy(picture.shape)}"
    if 0 in picture.shape:
        return f"{form} of at least one pixel; leave a camera out that saw nothing"
    if picture.shape[0] * picture.shape[1] > MAX_PIXELS:
        return f"{form} of at most {MAX_PIXELS} pixels; scale it down first"
    return f"{form}, 0 to 255; scale and round it"


def to_unit_range(picture: npt.NDArray[np.generic], *, field: str) -> torch.Tensor:
    """(h, w, 3) uint8 RGB to (1, 3, h, w) float32 in [0, 1]; InvalidInput for anything else."""
    return torch.from_numpy(np.ascontiguousarray(check(picture, field=field))).permute(2, 0, 1)[None].float() / 255.0


def prepare(
    picture: torch.Tensor, height: int, width: int, *, padding: Padding = Padding.CENTRED, field: str = "picture"
) -> torch.Tensor:
    """(B, 3, h, w) or (B, h, w, 3) floats in [0, 1] to (B, 3, height, width) float32 in [-1, 1]."""
    picture = _channels_first(picture, field).float()
    low, high = picture.aminmax()
    if not (low >= 0.0 and high <= 1.0):
        raise InvalidInput(
            f"has values from {low:.4g} to {high:.4g}; a picture is in [0, 1], so divide bytes by 255", field=field
        )
    return resize_with_padding(picture, height, width, padding) * 2.0 - 1.0


def resize_with_padding(picture: torch.Tensor, height: int, width: int, padding: Padding) -> torch.Tensor:
    """(B, 3, h, w) in [0, 1] to (B, 3, height, width), bars 0."""
    h, w = picture.shape[2:]
    if (h, w) == (height, width):
        return picture
    ratio = max(w / width, h / height)
    new_h, new_w = max(1, int(h / ratio)), max(1, int(w / ratio))
    resized = functional.interpolate(picture, size=(new_h, new_w), mode="bilinear", align_corners=False)
    rows, columns = height - new_h, width - new_w
    if padding is Padding.LEFT_TOP:
        return functional.pad(resized, (columns, 0, rows, 0), value=0.0)
    left, top = columns // 2, rows // 2
    return functional.pad(resized.clamp(0.0, 1.0), (left, columns - left, top, rows - top), value=0.0)


def prepare_cameras(
    pictures: Mapping[str, torch.Tensor],
    cameras: Sequence[str],
    height: int,
    width: int,
    *,
    padding: Padding = Padding.CENTRED,
    max_missing: int | None = None,
) -> Pictures:
    """Every camera of the model for a batch; those that the whole batch lacks come last, filled and masked.

    Args:
        pictures: By camera, see prepare(); names that are not among cameras are an error.
        cameras: The model's, in order.
        max_missing: At most so many missing cameras are filled in; None: all.
    """
    unknown = [name for name in pictures if name not in cameras]
    if unknown:
        raise InvalidInput(f"is no camera of this model, which has {', '.join(cameras)}", field=unknown[0])
    present = [name for name in cameras if name in pictures]
    if not present:
        raise InvalidInput(f"lacks every camera; the model needs one of {', '.join(cameras)}", field="observation")
    missing = [name for name in cameras if name not in pictures][:max_missing]
    values = [prepare(pictures[name], height, width, padding=padding, field=name) for name in present]
    rows = {value.shape[0] for value in values}
    if len(rows) != 1:
        raise InvalidInput(f"cameras have {sorted(rows)} rows; they must have the same number", field="observation")
    seen = torch.ones(values[0].shape[0], dtype=torch.bool, device=values[0].device)
    filled = torch.full_like(values[0], MISSING_VALUE)
    return Pictures(
        names=(*present, *missing),
        values=(*values, *[filled] * len(missing)),
        valid=(*[seen] * len(present), *[~seen] * len(missing)),
    )


def _remedy(shape: tuple[int, ...]) -> str:
    """For a picture whose axes are not those of a camera."""
    if len(shape) == 2 or shape[2:] == (1,):
        return "Repeat the grey values three times along the last axis"
    if len(shape) == 3 and shape[2] == 4:
        return "Leave the fourth channel out"
    if len(shape) == 3 and shape[0] == 3:
        return "Its colours come first: transpose it"
    return "Give one picture of one camera, colours last"


def _channels_first(picture: torch.Tensor, field: str) -> torch.Tensor:
    if not picture.is_floating_point():
        raise InvalidInput(f"is {picture.dtype}; a picture is floats in [0, 1]", field=field)
    if picture.ndim == 4 and 0 not in picture.shape:
        if picture.shape[1] == 3:
            return picture
        if picture.shape[3] == 3:
            return picture.permute(0, 3, 1, 2)
    raise InvalidInput(f"has shape {tuple(picture.shape)}; a picture is (rows, 3, h, w) or (rows, h, w, 3)", field=field)
