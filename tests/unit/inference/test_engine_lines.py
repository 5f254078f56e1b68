"""What the engine process says goes out at once, or with what comes next."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest

from manyhands.engine.v1 import engine_pb2
from services.inference import engine_messages
from services.inference.engine_lines import Line


@pytest.fixture
def ends() -> Iterator[tuple[Line, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    yield Line(ours), theirs
    ours.close()
    theirs.close()


def heard(theirs: socket.socket) -> list[str]:
    try:
        content = theirs.recv(1 << 16)
    except BlockingIOError:
        return []
    found = []
    header = engine_messages.FRAME_HEADER.size
    while content:
        length = engine_messages.frame_length(content[:header])
        message = engine_messages.parse(engine_pb2.FromEngine, content[header : header + length])
        found.append(message.text_piece.text)
        content = content[header + length :]
    return found


def is_woken(line: Line) -> bool:
    return bool(select.select([line.wake_fd], [], [], 0.0)[0])


def piece(text: str) -> engine_pb2.TextPiece:
    return engine_pb2.TextPiece(question_id=1, text=text)


def test_pieces_of_many_texts_wait_for_one_call_that_sends_them_all(ends: tuple[Line, socket.socket]) -> None:
    line, theirs = ends
    for text in ("put", "the", "cup"):
        line.post(at_once=False, text_piece=piece(text))
    assert heard(theirs) == []
    assert is_woken(line), "the main thread sends them"
    assert line.flush() is False
    assert heard(theirs) == ["put", "the", "cup"]
    assert not is_woken(line)
    line.post(at_once=False, text_piece=piece("down"))
    assert is_woken(line), "also after a flush"


def test_what_goes_at_once_does_not_pass_what_waits(ends: tuple[Line, socket.socket]) -> None:
    line, theirs = ends
    line.post(at_once=False, text_piece=piece("first"))
    line.post(text_piece=piece("second"))
    assert heard(theirs) == ["first", "second"]
    os.eventfd_read(line.wake_fd)
    line.post(text_piece=piece("third"))
    assert heard(theirs) == ["third"]
    assert not is_woken(line)
