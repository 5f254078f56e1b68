"""Reads the golden fixtures: a folder of <policy>.json and <policy>.safetensors as its README describes.

The folder is MANYHANDS_GOLDEN, else fixtures beside this file. Weights are not stored; they are drawn again
from their names and checked against the recorded hashes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

_VISION_TOWER = re.compile(r"\.(vision_tower|vision_model)\.")


def folder() -> Path:
    """AssertionError tells how to point to the fixtures when they are not there."""
    named = os.environ.get("MANYHANDS_GOLDEN")
    path = Path(named) if named else Path(__file__).parent / "fixtures"
    assert path.is_dir(), f"no golden fixtures at {path}; set MANYHANDS_GOLDEN to the folder that holds pi05.json"
    return path


class Golden:
    """One policy's fixture.

    Attributes:
        meta: The JSON.
        tensors: By key; inputs begin with "in.".
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy
        path = folder() / f"{policy}.json"
        assert path.is_file(), f"{path} is not there; {path.parent} must hold the fixtures its README describes"
        self.meta: dict[str, Any] = json.loads(path.read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))
        self.config: dict[str, Any] = self.meta["config"]
        self.dims: dict[str, Any] = self.meta["dims"]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def cases(self, ending: str) -> list[str]:
        """What stands before ending, of all tensors that end so."""
        return [key.removesuffix(ending) for key in self.tensors if key.endswith(ending)]

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """Every weight under lerobot's name, float32."""
        return {name: _weight(name, tuple(shape), kind, digest) for name, shape, kind, digest in self.meta["params"]}


@functools.cache
def _weight(name: str, shape: tuple[int, ...], kind: str, digest: str) -> torch.Tensor:
    """Fixtures share weights of the same name and shape: drawn once."""
    value = draw_weight(name, shape, kind)
    assert hashlib.sha256(value.tobytes()).hexdigest()[:16] == digest, (
        f"{name} came out differently: this numpy ({np.__version__}) has another random stream, nothing can match"
    )
    return torch.from_numpy(value)


def draw_weight(name: str, shape: tuple[int, ...], kind: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The README's weight rule; kind is matrix, vector or unit."""
    seed = int.from_bytes(hashlib.blake2b(name.encode()).digest()[:8], "big") % 2**63
    value = np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float64).astype(np.float32)
    if kind == "matrix":
        return value * np.float32(1.0 / math.sqrt(math.prod(shape[1:])))
    value = value * np.float32(0.1)
    return value + np.float32(1.0) if kind == "unit" else value


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| over the whole tensor, in float64."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    difference, norm = (actual.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / norm) if norm > 0 else float(difference)


def digest_errors(actual: Mapping[str, torch.Tensor | None], digests: Mapping[str, Any]) -> dict[str, float]:
    """Worst difference of norm, first values and probes of each gradient, as a part of the recorded norm."""
    found = {}
    assert actual.keys() == digests.keys()
    for name, expected in digests.items():
        if _VISION_TOWER.search(name) and name.endswith("self_attn.k_proj.bias"):
            continue  # Zero but for rounding: it shifts every score of a query alike.
        gradient = actual[name]
        if expected is None:
            found[name] = 0.0 if gradient is None else float(gradient.abs().sum())
            continue
        if gradient is None:
            found[name] = 1.0
            continue
        flat = gradient.flatten().double()
        norm = max(expected["norm"], 1e-30)
        worst = abs(float(flat.norm()) - expected["norm"])
        for values, wanted in ((flat[:8], expected["first"]), (flat[expected["probe_idx"]], expected["probe"])):
            worst = max(worst, float((values - torch.tensor(wanted, dtype=torch.float64)).abs().max()))
        found[name] = worst / norm
    return found
