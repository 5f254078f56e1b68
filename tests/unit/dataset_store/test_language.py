"""Language columns of a published root, read an episode at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_store.reader import DatasetReader
from dataset_store.verify import verify
from manyhands.errors import Corrupt
from policies.recipes.annotations import Annotations
from tests.support.language_lab import annotate, row, say
from tests.unit.dataset_store.test_publishing import DATASET, ingest, open_store

DATA = "data/chunk-000/file-000.parquet"
LENGTHS = {1: 6, 2: 4, 3: 5}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two batches: two data files."""
    folder = tmp_path_factory.mktemp("language")
    store = open_store(folder)
    for episode, length in LENGTHS.items():
        ingest(store, episode, length)
        if episode != 1:
            store.publish(DATASET)
    store.close()
    return folder / "datasets" / DATASET


@pytest.fixture
def root(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "copy"))


def persistent(episode):
    rows = [row("assistant", f"start {episode}", "subtask", timestamp=0.0)]
    return [*rows, row("assistant", f"end {episode}", "subtask", timestamp=0.1)] if episode else rows


def events(episode, frame):
    return [row("user", "stop", "interjection"), say("fine")] if (episode, frame) in ((0, 5), (2, 1)) else []


@pytest.mark.parametrize("one_group", [False, True])
def test_every_frame_has_its_episodes_rows_and_its_own_events(root, one_group):
    annotate(root, persistent, events, one_group=one_group)
    reader = DatasetReader(root)
    assert reader.has_language
    spoken = {}
    for index in np.random.default_rng(0).permutation(reader.num_frames).tolist():
        episode = reader.episodes[int(reader.episode_of(np.array([index]))[0])]
        found = reader.language_of(index)
        assert [(r["content"], np.float32(r["timestamp"])) for r in found["persistent"]] == [
            (r["content"], np.float32(r["timestamp"])) for r in persistent(episode.index)
        ]
        if found["events"]:
            spoken[episode.index, index - episode.from_index] = found["events"]
        Annotations.of(found)
    assert set(spoken) == {(0, 5), (2, 1)}
    assert spoken[0, 5][0]["content"] == "stop"
    assert spoken[0, 5][1]["tool_calls"][0]["function"] == {"name": "say", "arguments": {"text": "fine"}}
    starts = [reader.episodes[episode].from_index + frame for episode, frame in ((0, 5), (2, 1))]
    assert reader.event_frames().tolist() == starts


def test_numbers_and_verification_are_as_without_language(root, published):
    annotate(root, persistent, events)
    plain, annotated = DatasetReader(published), DatasetReader(root)
    assert plain.columns.keys() == annotated.columns.keys()
    assert annotated.spec == plain.spec
    assert verify(root).problems == ()
    assert plain.language_of(0) is None
    assert plain.event_frames().tolist() == []


def test_an_episode_is_read_once_and_no_other_with_it(root, monkeypatch):
    annotate(root, persistent, events)
    reader = DatasetReader(root)
    read = []
    original = pq.ParquetFile.read_row_group

    def counted(self, number, columns=None):
        read.append(number)
        return original(self, number, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    for index in (7, 8, 7, 9):
        reader.language_of(index)
    assert read == [1], "the row group of the second episode"


def test_frames_without_rows_may_be_null(root):
    annotate(root, persistent, events)
    table = pq.read_table(root / DATA)
    at = table.column_names.index("language_events")
    values = [value or None for value in table["language_events"].to_pylist()]
    pq.write_table(table.set_column(at, table.field(at), pa.array(values, table.field(at).type)), root / DATA)
    reader = DatasetReader(root)
    assert reader.language_of(0)["events"] == []
    assert reader.language_of(5)["events"][0]["content"] == "stop"
    assert reader.event_frames().tolist() == [5, 11]


def test_one_column_alone_is_refused(root):
    annotate(root, persistent, events)
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"]["language_events"]
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(Corrupt, match="language_persistent alone"):
        DatasetReader(root)


def test_a_tool_call_that_is_no_json_is_named(root):
    broken = {**say("x"), "tool_calls": None}
    annotate(root, lambda _: [], lambda e, f: [broken])
    table = pq.read_table(root / DATA)
    at = table.column_names.index("language_events")
    values = [[{**value, "tool_calls": ["{"]} for value in rows] for rows in table["language_events"].to_pylist()]
    pq.write_table(table.set_column(at, table.field(at), pa.array(values, table.field(at).type)), root / DATA)
    with pytest.raises(Corrupt, match="episode 0"):
        DatasetReader(root).language_of(0)
