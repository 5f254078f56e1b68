"""Each promise of the format, broken by hand, is found and named; readers refuse what would be silently wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from dataset_store import tools
from dataset_store.reader import DatasetReader
from dataset_store.verify import verify
from dataset_store.view import TrainingView
from manyhands.errors import Corrupt, InvalidInput, NotFound
from tests.support.store_lab import number_in
from tests.unit.dataset_store.test_publishing import DATASET, ingest, open_store

VIDEO = "videos/observation.images.top/chunk-000/file-000.mp4"
DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    store = open_store(folder)
    for episode, length in ((1, 6), (2, 4)):
        ingest(store, episode, length)
    store.publish(DATASET)
    store.close()
    return folder / "datasets" / DATASET


@pytest.fixture
def root(published: Path, tmp_path: Path) -> Path:
    """A copy outside of any store, to break."""
    return Path(shutil.copytree(published, tmp_path / "copy"))


def edit_info(root: Path, **changes: object) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_column(root: Path, path: str, name: str, change: Callable[[pa.ChunkedArray], object]) -> None:
    table = pq.read_table(root / path)
    position = table.column_names.index(name)
    changed = table.set_column(
        position, table.schema.field(name), pa.array(change(table[name]), table.schema.field(name).type)
    )
    groups = pq.ParquetFile(root / path).metadata
    sizes = [groups.row_group(group).num_rows for group in range(groups.num_row_groups)]
    with pq.ParquetWriter(root / path, changed.schema) as writer:
        start = 0
        for size in sizes:
            writer.write_table(changed.slice(start, size), row_group_size=size)
            start += size


def stray_before(root: Path) -> None:
    (root / "data/chunk-000/file-001.parquet").write_bytes((root / DATA).read_bytes())
    for column in ("data/file_index",):
        edit_column(root, EPISODES, column, lambda values: [2] * len(values))
    (root / DATA).rename(root / "data/chunk-000/file-002.parquet")


def swap_episode_rows(root: Path) -> None:
    pq.write_table(pq.read_table(root / EPISODES).take([1, 0]), root / EPISODES)


def rewrite_as_one_row_group(root: Path) -> None:
    pq.write_table(pq.read_table(root / DATA), root / DATA)


def drop_pandas_index(root: Path) -> None:
    path = root / "meta/tasks.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)


def count_pixels(root: Path) -> None:
    path = root / "meta/stats.json"
    statistics = json.loads(path.read_text())
    statistics["observation.images.top"]["count"] = [64 * 64 * 10]
    path.write_text(json.dumps(statistics))


def drop_statistics(root: Path) -> None:
    path = root / "meta/stats.json"
    statistics = json.loads(path.read_text())
    del statistics["action"]
    path.write_text(json.dumps(statistics))


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing video": (lambda root: (root / VIDEO).unlink(), "file-000.mp4 is missing"),
    "other video": (lambda root: shutil.copy(root / VIDEO.replace("top", "wrist"), root / VIDEO), ""),
    "truncated video": (lambda root: (root / VIDEO).write_bytes((root / VIDEO).read_bytes()[:500]), "videos/"),
    "shifted span": (
        lambda root: edit_column(
            root, EPISODES, "videos/observation.images.top/from_timestamp", lambda v: pc.add(v, 0.05).to_pylist()
        ),
        "episode 0 spans 1.0 to 6.0 frames, its length is 6",
    ),
    "not a keyframe": (
        lambda root: [
            edit_column(root, EPISODES, f"videos/observation.images.top/{end}_timestamp", lambda _, v=values: v)
            for end, values in (("from", [0.0, 0.25]), ("to", [0.25, 0.45]))
        ],
        "its length is",
    ),
    "too many frames counted": (lambda root: edit_info(root, total_frames=11), "the episodes have 10 frames"),
    "too many episodes counted": (lambda root: edit_info(root, total_episodes=3), "meta/episodes has 2 rows"),
    "old format": (lambda root: edit_info(root, codebase_version="v2.1"), "only 'v3.0' is supported"),
    "stray file in the middle": (stray_before, "belongs to no episode and sorts among others"),
    "rows of episodes swapped": (swap_episode_rows, "row 0 of meta/episodes is episode 1"),
    "one row group": (rewrite_as_one_row_group, "row groups of [10] rows, its episodes have [6, 4]"),
    "index with a gap": (
        lambda root: edit_column(root, DATA, "index", lambda v: [*range(9), 10]),
        "index of row 9 is 10, it must be 9",
    ),
    "wrong timestamp": (
        lambda root: edit_column(root, DATA, "timestamp", lambda v: np.asarray(v) + np.float32(1e-3)),
        "timestamp of row 0",
    ),
    "task that is none": (lambda root: edit_column(root, DATA, "task_index", lambda v: [7] * 10), "task_index goes from 7"),
    "not finite": (
        lambda root: edit_column(root, DATA, "action", lambda v: [[np.nan, 0.0], *v.to_pylist()[1:]]),
        "action is not finite in row 0",
    ),
    "tasks without index": (drop_pandas_index, "does not declare task as pandas' index"),
    "pixels counted": (count_pixels, "counts 40960 of observation.images.top in 10 frames"),
    "no statistics": (drop_statistics, "lacks statistics of action"),
    "no tasks": (lambda root: (root / "meta/tasks.parquet").unlink(), "meta/tasks.parquet: FileNotFoundError"),
}
del BREAKS["other video"]  # Only digests tell; see below.


@pytest.mark.parametrize("name", BREAKS)
def test_broken_promise_is_named(root: Path, name: str) -> None:
    assert verify(root).problems == ()
    breaks, message = BREAKS[name]
    breaks(root)
    problems = verify(root).problems
    assert any(message in problem for problem in problems), problems


def test_exchanged_file_is_found_by_its_digest(published: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(published.parent.parent, tmp_path / "store"))
    root = store / "datasets" / DATASET
    shutil.copy(root / VIDEO.replace("top", "wrist"), root / VIDEO)
    assert [problem for problem in verify(root).problems if "digest differs" in problem]


def test_command_says_it_and_exits_with_1(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tools.main(tools.Settings(action="verify", root=root)) == 0
    assert "2 episodes, 10 frames, conformant" in capsys.readouterr().out
    (root / VIDEO).unlink()
    assert tools.main(tools.Settings(action="verify", root=root)) == 1
    assert "PROBLEM" in capsys.readouterr().out
    assert tools.main(tools.Settings(action="verify", root=root / "nowhere")) == 1


def test_info_and_list_describe(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tools.main(tools.Settings(action="info", root=published)) == 0
    shown = capsys.readouterr().out
    assert "2 episodes, 10 frames at 20 Hz" in shown
    assert "observation.images.top uint8 [64, 64, 3]" in shown
    assert tools.main(tools.Settings(action="list", root=published.parent.parent)) == 0
    assert f"{DATASET}: 2 episodes, 10 frames" in capsys.readouterr().out
    assert tools.main(tools.Settings(action="list", root=published)) == 1


@pytest.mark.parametrize("name", ["index with a gap", "rows of episodes swapped", "too many frames counted"])
def test_reader_refuses_what_would_be_silently_wrong(root: Path, name: str) -> None:
    BREAKS[name][0](root)
    with pytest.raises(Corrupt):
        DatasetReader(root)


def test_reader_says_what_is_not_there(root: Path) -> None:
    with pytest.raises(NotFound, match="no published dataset"):
        DatasetReader(root / "meta")
    reader = DatasetReader(root)
    with pytest.raises(InvalidInput, match="is no camera"):
        next(reader.pictures("observation.images.left", 0))
    with pytest.raises(InvalidInput, match="frames must be 0 to 5"):
        next(reader.pictures("observation.images.top", 0, [6]))


def test_view_of_a_grown_dataset_decodes_only_what_is_new(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    camera = "observation.images.top"
    TrainingView(root, horizon=1, cameras=[camera], cache_dir=tmp_path / "view")
    names = {path.name for path in (tmp_path / "view").iterdir()}
    assert len(names) == 2
    monkeypatch.setattr(DatasetReader, "pictures", lambda *_: pytest.fail("decoded again"))
    TrainingView(root, horizon=1, cameras=[camera], cache_dir=tmp_path / "view")
    monkeypatch.undo()
    TrainingView(root, horizon=1, cameras=[camera], image_size=(16, 16), cache_dir=tmp_path / "view")
    assert len({path.name for path in (tmp_path / "view").iterdir()} - names) == 2, "another transform, other files"


def test_view_is_told_what_it_needs(root: Path) -> None:
    with pytest.raises(InvalidInput, match="cache_dir"):
        TrainingView(root, horizon=1, cameras=["observation.images.top"])
    with pytest.raises(InvalidInput, match="is no camera"):
        TrainingView(root, horizon=1, cameras=["x"], cache_dir=root)
    with pytest.raises(InvalidInput, match="horizon"):
        TrainingView(root, horizon=0)
    with pytest.raises(InvalidInput, match="indices"):
        TrainingView(root, horizon=1).batch(np.array([10]))


def test_pictures_come_back_in_any_order_after_a_fork_and_with_few_decoders(root: Path) -> None:
    reader = DatasetReader(root, max_open_videos=1)
    cameras = ("observation.images.top", "observation.images.wrist")

    def read_all() -> list[int]:
        wanted = [(camera, episode, frame) for frame in (3, 0, 2) for episode in (1, 0) for camera in cameras]
        return [number_in(next(reader.pictures(camera, episode, [frame]))) for camera, episode, frame in wanted]

    numbers = [((e + 1) * 256 + frame) ^ mask for frame in (3, 0, 2) for e in (1, 0) for mask in (0, 65535)]
    assert read_all() == numbers
    child = os.fork()
    if child == 0:
        os._exit(0 if read_all() == numbers else 1)
    assert read_all() == numbers
    assert os.waitpid(child, 0)[1] == 0
