"""Small policies in lerobot's folder: its config.json can only name sizes, so tests give the names small ones."""

from __future__ import annotations

import pytest

from policies.pi052 import lerobot_config as pi_fields
from policies.pi052.config import NetworkConfig as PiNetwork
from policies.smolvla2 import lerobot_config as smol_fields
from policies.smolvla2.config import NetworkConfig as SmolNetwork


def name_pi_sizes(monkeypatch: pytest.MonkeyPatch, network: PiNetwork) -> None:
    """lerobot's gemma_2b and gemma_300m are this network's towers, and its vision tower lerobot's."""
    monkeypatch.setattr(pi_fields, "TOWERS", {"gemma_2b": network.language, "gemma_300m": network.expert})
    monkeypatch.setattr(pi_fields, "BASE", network)


def name_smol_sizes(monkeypatch: pytest.MonkeyPatch, network: SmolNetwork) -> None:
    """lerobot's SmolVLM2-500M is this network's language and vision tower."""
    monkeypatch.setattr(smol_fields, "BASE", network)
