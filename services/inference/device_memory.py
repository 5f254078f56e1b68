"""How full a GPU's memory is."""

from __future__ import annotations

import torch


def device_memory(device: str) -> tuple[int, int]:
    """(used by all processes, total) in bytes; zeros where the device is none that CUDA names, or does not answer."""
    if torch.device(device).type != "cuda":
        return 0, 0
    try:
        free, total = torch.cuda.mem_get_info(torch.device(device))
    except RuntimeError:  # A device that has failed; whoever runs on it says so.
        return 0, 0
    return total - free, total
