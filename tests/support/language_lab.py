"""A published root with language columns, as another program would write them after the recording, and a small pi052."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer

from manyhands.spec import Spec
from policies import checkpoint as policy_checkpoint
from policies import files as policy_files
from policies.pi052 import config as configs
from policies.prompts.locations import LOCATION_TOKENS
from tests.support.text_lab import PI_SPECIAL, bytes_tokenizer
from tests.unit.dataset_store.test_publishing import DATASET, ingest, open_store

Rows = Sequence[Mapping[str, Any]]
_FIELDS = [("role", pa.string()), ("content", pa.string()), ("style", pa.string())]
_REST = [("camera", pa.string()), ("tool_calls", pa.list_(pa.string()))]
PERSISTENT = pa.list_(pa.struct([*_FIELDS, ("timestamp", pa.float32()), *_REST]))
EVENTS = pa.list_(pa.struct([*_FIELDS, *_REST]))
FEATURE = {"dtype": "language", "shape": [1], "names": None}
# Before those, in info.json and in the files.
_LAST = 5


def publish(folder: Path, *, num_episodes: int, num_frames: int) -> Path:
    """A root whose episode e has task e % 3, two cameras, three numbers of state and two of action (lab_frame)."""
    store = open_store(folder)
    for episode in range(num_episodes):
        ingest(store, episode, num_frames)
    store.publish(DATASET)
    store.close()
    return folder / "datasets" / DATASET


def save_pi052(folder: Path, spec: Spec, *, horizon: int = 8, **changes: Any) -> None:
    """An untrained checkpoint with a network of some hundred thousand weights and a small tokenizer."""
    raw = _pi_tokenizer()
    tower = configs.TowerSize(width=32, depth=2, mlp=64, heads=2, head_dim=16)
    network = configs.NetworkConfig(
        vision=configs.VisionSize(width=16, depth=1, mlp=32, heads=2, patch=8),
        language=tower,
        expert=tower,
        vocabulary=raw.get_vocab_size(),
        image_height=16,
        image_width=16,
        action_size=8,
    )
    settings = {"horizon": horizon, "num_steps": 4, "prompt_length": 64, "flow_repeats": 2, **changes}
    torch.manual_seed(0)
    config = configs.dump(configs.Pi052Config(network=network, **settings))
    files = {policy_files.TOKENIZER: raw.to_str().encode()}
    policy_checkpoint.save(policy_checkpoint.build("pi052", config, spec, files), folder)


def _pi_tokenizer() -> Tokenizer:
    """A token a byte, but a space and the letter after it are one, as in the real one: answers begin with it."""
    words = [f"Ġ{letter}" for letter in string.ascii_lowercase]
    raw = bytes_tokenizer(PI_SPECIAL, (*LOCATION_TOKENS, *words, *(f"unused {i}" for i in range(3000))))
    content = json.loads(raw.to_str())
    content["model"]["merges"] = [list(word) for word in words]
    return Tokenizer.from_str(json.dumps(content))


def annotate(
    root: Path, persistent: Callable[[int], Rows], events: Callable[[int, int], Rows], *, one_group: bool = False
) -> None:
    """Rewrites the data files of root with both columns.

    Args:
        persistent: Of an episode.
        events: Of an episode's frame.
        one_group: Each file as one row group, as other writers have it.
    """
    for path in sorted((root / "data").glob("*/*.parquet")):
        file = pq.ParquetFile(path)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        table = file.read()
        pairs = list(zip(table["episode_index"].to_pylist(), table["frame_index"].to_pylist(), strict=True))
        columns = {
            "language_persistent": pa.array([_stored(persistent(episode)) for episode, _ in pairs], PERSISTENT),
            "language_events": pa.array([_stored(events(*pair)) for pair in pairs], EVENTS),
        }
        at = table.num_columns - _LAST
        for name, values in reversed(columns.items()):
            table = table.add_column(at, name, values)
        with pq.ParquetWriter(path, table.schema) as writer:
            for size in [table.num_rows] if one_group else sizes:
                writer.write_table(table.slice(0, size), row_group_size=size)
                table = table.slice(size)
    info = json.loads((root / "meta/info.json").read_text())
    features = list(info["features"].items())
    features[-_LAST:-_LAST] = [(name, FEATURE) for name in ("language_persistent", "language_events")]
    info["features"] = dict(features)
    (root / "meta/info.json").write_text(json.dumps(info))


def row(role: str, content: str | None, style: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, "style": style, **more}


def say(text: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": text}}}
    return {"role": "assistant", "content": None, "style": None, "tool_calls": [call]}


def _stored(rows: Rows) -> list[dict[str, Any]]:
    return [
        {**entry, "tool_calls": [json.dumps(call) for call in entry["tool_calls"]] if entry.get("tool_calls") else None}
        for entry in rows
    ]
