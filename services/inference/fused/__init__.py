"""The fast path of one pi052 network: fused weights, units of work in slots, captured graphs.

docs/design/0015-fused-engine.md says why it is as it is.
"""

from __future__ import annotations

from .network import FusedPi052
from .settings import FusedSettings, PrefixRow, TextRow
from .starts import ChunkStart

__all__ = ["ChunkStart", "FusedPi052", "FusedSettings", "PrefixRow", "TextRow"]
