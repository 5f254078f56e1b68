from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands import framelog
from manyhands.errors import Corrupt, InvalidInput
from manyhands.framelog import LogWriter, read_log


def written(path: Path, payloads: list[bytes]) -> Path:
    with LogWriter(path) as log:
        for payload in payloads:
            log.append(payload)
        log.sync()
    return path


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = written(tmp_path / "a.log", [b"one", b"", b"three" * 1000])
    payloads, valid_length = read_log(path)
    assert list(payloads) == [b"one", b"", b"three" * 1000]
    assert valid_length == path.stat().st_size


@settings(max_examples=40, deadline=None)
@given(payloads=st.lists(st.binary(max_size=40), min_size=1, max_size=6), data=st.data())
def test_cut_anywhere_leaves_exactly_the_whole_records(
    payloads: list[bytes], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.mktemp("log") / "a.log", payloads)
    ends = [0]
    for payload in payloads:
        ends.append(ends[-1] + framelog.HEADER_BYTES + len(payload))
    cut = data.draw(st.integers(0, ends[-1]))
    os.truncate(path, cut)
    whole = sum(end <= cut for end in ends) - 1
    found, valid_length = read_log(path)
    assert list(found) == payloads[:whole]
    assert valid_length == ends[whole]
    with LogWriter(path) as log:  # Goes on behind the last whole record.
        assert log.num_records == whole
        log.append(b"next")
    found, valid_length = read_log(path)
    assert list(found) == [*payloads[:whole], b"next"]
    assert valid_length == path.stat().st_size


@pytest.mark.parametrize("tail", [bytes(64), b"\xff" * 64, b"\x05\x00\x00\x00\x00\x00\x00\x00hello"])
def test_garbage_tail_is_found_and_cut(tmp_path: Path, tail: bytes) -> None:
    path = written(tmp_path / "a.log", [b"good"])
    with path.open("ab") as file:
        file.write(tail)
    assert list(read_log(path)[0]) == [b"good"]
    assert framelog.truncate_torn(path) == len(tail)
    assert framelog.truncate_torn(path) == 0
    assert list(read_log(path)[0]) == [b"good"]


def test_flipped_bit_ends_the_valid_part(tmp_path: Path) -> None:
    path = written(tmp_path / "a.log", [b"first", b"second", b"third"])
    content = bytearray(path.read_bytes())
    content[framelog.HEADER_BYTES + 5 + framelog.HEADER_BYTES] ^= 1
    path.write_bytes(content)
    assert list(read_log(path)[0]) == [b"first"]


def test_failed_write_leaves_no_trace_and_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogWriter(tmp_path / "a.log")
    log.append(b"before")
    real_writev = os.writev

    def full_after_three_bytes(fd: int, parts: list[bytes]) -> int:
        if len(parts) == 2 and parts[1] == b"large":
            return real_writev(fd, [parts[0][:3]])
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "writev", full_after_three_bytes)
    with pytest.raises(OSError, match="no space"):
        log.append(b"large")
    monkeypatch.undo()
    log.append(b"after")
    assert list(read_log(log.path)[0]) == [b"before", b"after"]
    assert read_log(log.path)[1] == log.path.stat().st_size


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_writev = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, parts: real_writev(fd, [bytes(parts[0])[:5]]))
    log = LogWriter(tmp_path / "a.log")
    log.append(b"a payload of some length")
    assert list(read_log(log.path)[0]) == [b"a payload of some length"]


def test_after_a_failed_sync_nothing_more_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "disk")

    log = LogWriter(tmp_path / "a.log")
    log.append(b"x")
    log.sync()
    log.append(b"dropped by the kernel, though still readable")
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="disk"):
        log.sync()
    monkeypatch.undo()
    with pytest.raises(Corrupt, match="open it again"):
        log.append(b"y")
    with pytest.raises(Corrupt, match="open it again"):
        log.sync()
    assert list(read_log(log.path)[0]) == [b"x"]


def test_oversized_record_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framelog, "MAX_RECORD_BYTES", 10)
    log = LogWriter(tmp_path / "a.log")
    with pytest.raises(InvalidInput, match="limit of 10"):
        log.append(b"x" * 11)
    assert log.path.stat().st_size == 0
