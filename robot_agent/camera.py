"""Where pictures come from. Drivers with their own thread keep the newest frame and its stamp; read() only copies it."""

from __future__ import annotations

import abc

import numpy as np
import numpy.typing as npt

from manyhands.robot.types import CameraGeometry

from .robot import Reading


class Camera(abc.ABC):
    """One camera of one robot.

    Attributes:
        geometry: Name of its feature, size before resizing, and how it is resized.
    """

    geometry: CameraGeometry

    @abc.abstractmethod
    def connect(self) -> None:
        """Opens the device and waits for a first frame; Refused when there is none."""

    @abc.abstractmethod
    def read(self) -> Reading:
        """The newest frame, (H, W, 3) uint8 RGB, the right way up, stamped when it was exposed or, failing that, received.
        A camera that stopped answers its last stamp, so that the frame ages and becomes invalid."""

    @abc.abstractmethod
    def disconnect(self) -> None:
        """Closes the device; safe to call twice."""


def picture(pixels: npt.NDArray[np.uint8], captured_ns: int) -> Reading:
    """A frame as a reading; pixels are made contiguous, as the codec sends them row by row."""
    return Reading(value=np.ascontiguousarray(pixels), captured_ns=captured_ns)
