"""Where a device's time goes: what units of each kind took of it, and what was lost between units. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .units import UnitKind

# What lies between two units while there is work is the host's: usually far below a millisecond, and a few where another
# thread holds the interpreter or slots are wiped. A device that stands still for longer has nothing to do, or its weights
# change.
LONGEST_GAP_S = 0.005


@dataclass(frozen=True, kw_only=True)
class UnitUse:
    """What units of one model and kind took.

    Attributes:
        device_s: On the device.
        num_rows: Chunks or texts, each counted in every unit that it was part of.
    """

    device_s: float = 0.0
    num_units: int = 0
    num_rows: int = 0


@dataclass(frozen=True, kw_only=True)
class DeviceTime:
    """What a device did from some moment on.

    Attributes:
        units: By model and kind; empty where nothing runs in units.
        gap_s: That no unit ran although there was work.
    """

    units: Mapping[tuple[str, UnitKind], UnitUse] = field(default_factory=dict)
    gap_s: float = 0.0

    def since(self, earlier: DeviceTime) -> DeviceTime:
        """What came after earlier, of the same engine. Raises ValueError where something became less."""
        nothing = UnitUse()
        units = {kind: _difference(use, earlier.units.get(kind, nothing)) for kind, use in self.units.items()}
        gap_s = self.gap_s - earlier.gap_s
        if gap_s < 0 or any(min(use.device_s, use.num_units, use.num_rows) < 0 for use in units.values()):
            raise ValueError(f"a device cannot have done less ({self}) than a moment ago ({earlier})")
        return DeviceTime(units=units, gap_s=gap_s)


class DeviceUse:
    """Adds up what units take, from the engine's start on.

    Args:
        kinds: Models and kinds of their units; there from the start, at 0.
    """

    def __init__(self, kinds: Iterable[tuple[str, UnitKind]]) -> None:
        self._units = {kind: UnitUse() for kind in kinds}
        self._gap_s = 0.0

    def add(self, model: str, kind: UnitKind, *, num_rows: int, device_s: float, gap_s: float) -> None:
        """A unit is done.

        Args:
            gap_s: Between the unit before it and this one, 0 where there was nothing to do; one that is long is not counted.
        """
        before = self._units[model, kind]
        self._units[model, kind] = UnitUse(
            device_s=before.device_s + device_s,
            num_units=before.num_units + 1,
            num_rows=before.num_rows + num_rows,
        )
        if gap_s < LONGEST_GAP_S:
            self._gap_s += max(0.0, gap_s)

    def so_far(self) -> DeviceTime:
        return DeviceTime(units=dict(self._units), gap_s=self._gap_s)


def _difference(later: UnitUse, earlier: UnitUse) -> UnitUse:
    return UnitUse(
        device_s=later.device_s - earlier.device_s,
        num_units=later.num_units - earlier.num_units,
        num_rows=later.num_rows - earlier.num_rows,
    )
