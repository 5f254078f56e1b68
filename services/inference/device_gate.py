"""The engine's end of the picture gate: a device that waits at it, and whoever opens it when nobody else does."""

from __future__ import annotations

import ctypes
import logging

import torch

from .picture_gate import PictureGate

logger = logging.getLogger(__name__)

# The front end opens a gate within milliseconds, on the loop that every request comes by: one that has not by now is ill.
PATIENCE_S = 0.1
# Of cudaHostRegister: for every context, and at an address that the device knows.
_PORTABLE, _MAPPED = 1, 2
# Of cuStreamWaitValue32: until the value in memory is that or a later one.
_AT_LEAST = 0


class DeviceGate:
    """Of one device. Where that is the CPU nothing waits: what is launched behind the gate runs when the row has come.

    The front end writes and opens; open_left() may be called on any thread, the rest belongs to the engine's.

    Raises:
        RuntimeError: The driver cannot pin this memory.
    """

    def __init__(self, gate: PictureGate, device: torch.device) -> None:
        self.device = device
        self._gate = gate
        self._bytes = torch.from_numpy(gate.pictures)
        self._newest = 0
        self._left = 0
        self._since_s = 0.0
        if device.type == "cuda":
            memory = gate.memory
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            with torch.cuda.device(device):
                failed = runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE | _MAPPED)
            if int(failed) or not self._bytes.is_pinned():
                raise RuntimeError(f"the driver does not pin the gate's memory: {failed}")
            self._address = ctypes.c_uint64(memory.ctypes.data)
            self._wait_value = ctypes.CDLL("libcuda.so.1").cuStreamWaitValue32_v2

    def pictures(self, shape: torch.Size) -> torch.Tensor:
        """What the front end wrote, or will have written: uint8, pinned."""
        return self._bytes[: shape.numel()].view(shape)

    def wait(self, number: int, now_s: float) -> None:
        """Has the device wait at this gate before it does what is launched next."""
        self._since_s = now_s
        self._newest = number  # Last: open_left() reads it first.
        if self.device.type != "cuda":
            return
        # The default stream's handle says nothing of its device: it is the current one's.
        with torch.cuda.device(self.device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            failed = self._wait_value(stream, self._address, ctypes.c_uint32(number), ctypes.c_uint(_AT_LEAST))
        if failed:
            raise RuntimeError(f"the device cannot wait for a gate: CUDA error {failed}")

    def has_brought(self, number: int) -> bool:
        """Whether the pictures behind the gate are those of its row; asked when the row has come."""
        return number not in (0, self._left) and self._gate.is_open(number)

    def open_left(self, now_s: float) -> None:
        """Lets the device go on where nobody opened the gate; the row, if it comes, brings its pictures itself."""
        number = self._newest
        if number > self._left and not self._gate.is_open(number) and now_s - self._since_s > PATIENCE_S:
            self._left = number
            # Once more, and nothing between: over a later number this one would close gates again.
            if not self._gate.is_open(number):
                self._gate.open(number)
            logger.warning("the front end left gate %d closed; it was opened, and its row goes the other way", number)
