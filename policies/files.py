"""What a policy needs besides numbers, tokenizers and a recipe, as the bytes of files with fixed names.

They travel with a checkpoint: what a policy reads and writes as text is as much a part of it as its weights. No other name
than these is ever read from or written to a checkpoint's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from manyhands.errors import InvalidInput

TOKENIZER = "tokenizer/tokenizer.json"
ACTION_TOKENIZER = "action_tokenizer/tokenizer.json"
ACTION_TOKENIZER_CONFIG = "action_tokenizer/processor_config.json"
RECIPE = "recipe.yaml"
NAMES = (TOKENIZER, ACTION_TOKENIZER, ACTION_TOKENIZER_CONFIG, RECIPE)

# PaliGemma's tokenizer.json, the largest known, has some 35 MB.
MAX_FILE_BYTES = 256 * 1024 * 1024

Files = Mapping[str, bytes]
"""By the names above; those that a policy has no use for are not there."""


def read(folder: Path) -> dict[str, bytes]:
    """Those that the folder has."""
    found = {}
    for name in NAMES:
        path = folder / name
        if path.is_file():
            if path.stat().st_size > MAX_FILE_BYTES:
                raise InvalidInput(f"{path} has over {MAX_FILE_BYTES} bytes; that is not a tokenizer or recipe", field=name)
            found[name] = path.read_bytes()
    return found


def write(files: Files, folder: Path) -> None:
    """Into an existing folder."""
    for name in NAMES:
        if name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(files[name])
