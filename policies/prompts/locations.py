"""Answers about pictures: JSON with coordinates from 0 to 1000, and PaliGemma's location tokens.

    {"label": "lid", "point": [x, y], "point_format": "xy"}                         lid <locY><locX>
    {"detections": [{"label": "lid", "bbox": [x1, y1, x2, y2]}, ...]}               lid <locY1><locX1><locY2><locX2> ; ...

Tokens run from <loc0000> to <loc1023> over the picture, y before x. Which camera is meant is not part of the answer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

LOCATION_TOKENS = tuple(f"<loc{i:04d}>" for i in range(1024))

_LAST = 1023
_JSON_RANGE = 1000
# No coordinate of a picture; infinities and NaN neither.
_FAR = 1e6
_LOCATION = re.compile(r"<loc([0-9]{4})>")
# Other formats of coordinates stay as they are written.
_FORMATS = {"point": ("point_format", "xy", 2), "bbox": ("bbox_format", "xyxy", 4)}


@dataclass(frozen=True, kw_only=True)
class Location:
    """Attributes:
    coordinates: Fractions of the picture's width and height: (x, y) of a point or (x1, y1, x2, y2) of a box.
    """

    label: str
    coordinates: tuple[float, ...]


def from_json(answer: str) -> str | None:
    """The answer with location tokens; None where it is not JSON or has no labelled place: leave it as it is."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    if "point_format" in value:
        return _entry(value, "point")
    detections = value.get("detections")
    if not isinstance(detections, list):
        return None
    entries = [_entry(detection, "bbox") for detection in detections if isinstance(detection, dict)]
    return " ; ".join(entry for entry in entries if entry is not None) or None


def parse(text: str) -> list[Location]:
    """Places in generated text, in its order; parts without two or four location tokens are left out."""
    places = []
    for part in text.split(";"):
        tokens = [int(token) / _LAST for token in _LOCATION.findall(part)]
        if len(tokens) in (2, 4) and max(tokens) <= 1.0:
            coordinates = tuple(value for y, x in zip(tokens[::2], tokens[1::2], strict=True) for value in (x, y))
            places.append(Location(label=_LOCATION.sub("", part).strip(), coordinates=coordinates))
    return places


def _entry(value: dict[str, object], name: str) -> str | None:
    format_name, only_format, count = _FORMATS[name]
    label, numbers = value.get("label"), value.get(name)
    if not isinstance(label, str) or not label.strip() or value.get(format_name, only_format) != only_format:
        return None
    if not isinstance(numbers, list) or len(numbers) != count or not all(_is_number(number) for number in numbers):
        return None
    swapped = [numbers[i ^ 1] for i in range(count)]
    return f"{label.strip()} " + "".join(LOCATION_TOKENS[_index(number)] for number in swapped)


def _index(coordinate: float) -> int:
    return min(max(round(coordinate / _JSON_RANGE * _LAST), 0), _LAST)  # Halves go to the even neighbour.


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _FAR
