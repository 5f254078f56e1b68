from __future__ import annotations

from pathlib import Path

import pytest

from actor.run_state import FILE_NAME, RunProgress
from manyhands.actor.v1 import actor_pb2
from manyhands.common.v1 import common_pb2
from manyhands.dataset.v1 import dataset_pb2
from manyhands.errors import Corrupt

RUN = actor_pb2.RunDefinition(run_id="r", mode=actor_pb2.RUN_MODE_POLICY, episode_count=5, first_seed=2**40, model="m")
RESULT = actor_pb2.EpisodeResult(
    episode_uuid="u",
    seed=2**40,
    frame_count=7,
    success=True,
    reason=dataset_pb2.EPISODE_END_SUCCESS,
    versions=[common_pb2.PolicyVersion(model="m", number=3, digest=b"\x00\xff" * 16)],
)


def test_nothing_is_remembered_where_nothing_ran(tmp_path: Path) -> None:
    assert RunProgress.load(tmp_path) is None


def test_progress_comes_back_as_it_was(tmp_path: Path) -> None:
    progress = RunProgress(definition=RUN, attempt_count=4, results=[RESULT])
    progress.save(tmp_path)
    back = RunProgress.load(tmp_path)
    assert back == progress
    assert back is not None
    assert (back.success_count, back.finished, back.ending) == (1, False, None)


def test_an_ending_counts_exactly_once_whenever_the_crash_came(tmp_path: Path) -> None:
    progress = RunProgress(definition=RUN)
    progress.begin_ending(RESULT)
    progress.save(tmp_path)
    before_end = RunProgress.load(tmp_path)
    assert before_end is not None
    assert before_end.decided_ends() == {"u": dataset_pb2.EPISODE_END_SUCCESS}
    before_end.complete_ending()
    before_end.save(tmp_path)
    after = RunProgress.load(tmp_path)
    assert after is not None
    after.complete_ending()
    assert (after.attempt_count, after.results, after.decided_ends()) == (1, [RESULT], {})


def test_a_crash_while_saving_leaves_the_last_state(tmp_path: Path) -> None:
    RunProgress(definition=RUN, attempt_count=1).save(tmp_path)
    (tmp_path / f"{FILE_NAME}.new").write_text('{"definition": {"ru')
    back = RunProgress.load(tmp_path)
    assert back is not None
    assert back.attempt_count == 1


@pytest.mark.parametrize("text", ["", "[]", '{"definition": {"no_such_field": 1}}'])
def test_a_file_of_something_else_is_named_with_the_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(Corrupt, match="move it away"):
        RunProgress.load(tmp_path)
