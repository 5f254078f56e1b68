"""Observations that fit a spec, encoded once: the tool must be cheap beside what it measures."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from manyhands import codec
from manyhands.common.v1 import common_pb2
from manyhands.spec import Feature, FeatureKind, Spec

NUM_VARIANTS = 8


def make(spec: Spec, required: tuple[str, ...], seed: int) -> dict[str, npt.NDArray[np.generic]]:
    """Arrays by name, in the order of required."""
    by_name = {feature.name: feature for feature in spec.observation}
    random = np.random.default_rng(seed)
    return {name: _values(by_name[name], random) for name in required}


def encode(observation: dict[str, npt.NDArray[np.generic]], jpeg_quality: int | None) -> list[common_pb2.NamedValue]:
    """As a robot sends them; jpeg_quality None: uncompressed."""
    values: list[common_pb2.NamedValue] = []
    for name, array in observation.items():
        if array.ndim == 3 and array.dtype == np.uint8:
            pixels = array.view(np.uint8)
            if jpeg_quality is None:
                picture = codec.encode_image(pixels, common_pb2.IMAGE_ENCODING_RAW_RGB8)
            else:
                picture = codec.encode_image(pixels, jpeg_quality=jpeg_quality)
            values.append(common_pb2.NamedValue(name=name, image=picture))
        else:
            values.append(common_pb2.NamedValue(name=name, tensor=codec.encode_tensor(array)))
    return values


def _values(feature: Feature, random: np.random.Generator) -> npt.NDArray[np.generic]:
    if feature.kind is not FeatureKind.IMAGE:
        return random.normal(scale=0.3, size=feature.shape).astype(feature.dtype)
    # Smooth with some noise, as a camera's: pure noise would make JPEG ten times too big.
    height, width = feature.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width]
    phase = random.uniform(0, 2 * np.pi, size=3)
    waves = np.stack([np.sin(rows / 17 + shift) + np.cos(columns / 13 + shift) for shift in phase], axis=2)
    return np.clip(127 + 60 * waves + random.normal(scale=6.0, size=waves.shape), 0, 255).astype(np.uint8)
