"""The spec's numbers as single vectors, feature after feature: their size, their names, their statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from manyhands.errors import InvalidInput
from manyhands.spec import Feature

from .normalization import Statistics


def size(features: Sequence[Feature]) -> int:
    return sum(feature.shape[0] for feature in features)


def element_names(features: Sequence[Feature]) -> list[str]:
    """One per element; the feature's own name where its elements have none."""
    return [name for feature in features for name in feature.element_names or (feature.name,) * feature.shape[0]]


def join_statistics(statistics: Mapping[str, Statistics], features: Sequence[Feature]) -> dict[str, npt.NDArray[np.float64]]:
    """{mean, std, ...} of the concatenated vector: those that every feature has."""
    for feature in features:
        if feature.name not in statistics:
            raise InvalidInput("has no statistics", field=feature.name)
    if not features:
        return {}
    names = set.intersection(*(set(statistics[feature.name]) for feature in features)) - {"count"}
    return {
        name: np.concatenate([np.asarray(statistics[f.name][name], dtype=np.float64).reshape(-1) for f in features])
        for name in sorted(names)
    }
