"""Run by an interpreter that has lerobot: prints what each frame of a root shows, read by lerobot's own code.

Line: FRAME <number in the first camera> <in the second> <episode in the state> <frame in the state>
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types

os.environ["HF_HUB_OFFLINE"] = "1"

if importlib.util.find_spec("torchvision") is None:
    # lerobot imports it for augmentations that are not used here, and no build fits every torch.
    class _Names(types.ModuleType):
        def __getattr__(self, name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (object,), {})

    for _name in ("", ".transforms", ".transforms.v2", ".transforms.v2.functional", ".transforms.functional", ".io"):
        _module = _Names(f"torchvision{_name}")
        _module.__spec__ = importlib.machinery.ModuleSpec(_module.__name__, None)
        _module.__path__ = []
        sys.modules[_module.__name__] = _module

from lerobot.datasets.lerobot_dataset import LeRobotDataset


def number_in(picture: object) -> int:
    """picture: (3, 64, 64) float tensor in [0, 1]."""
    means = picture.mean(dim=0).reshape(4, 16, 4, 16).mean(dim=(1, 3)).flatten().tolist()  # type: ignore[attr-defined]
    return sum(1 << bit for bit, mean in enumerate(means) if mean > 0.5)


dataset = LeRobotDataset("local/check", root=sys.argv[1], video_backend="torchcodec")
for index in range(len(dataset)):
    frame = dataset[index]
    state = frame["observation.state"].tolist()
    if frame["task"] != f"task {int(state[0]) % 3}":
        sys.exit(f"row {index} has task {frame['task']!r}")
    cameras = [number_in(frame[f"observation.images.{name}"]) for name in ("top", "wrist")]
    sys.stdout.write(f"FRAME {cameras[0]} {cameras[1]} {int(state[0])} {int(state[1])}\n")
