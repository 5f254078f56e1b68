"""The link between a robot and its server is cut: mended in time, or never."""

from __future__ import annotations

import time

import pytest

from manyhands.clients.act_stream import Chunk, Reply
from manyhands.clients.inference import InferenceClient
from manyhands.errors import Unreachable
from tests.support.fault_lab import Lab, Robot
from tests.support.inference_lab import next_reply
from tests.support.proxy import CuttableLink
from tests.support.waiting import wait_until

# A ping after 10 s without a word, 5 s for its answer (manyhands/server.py); earlier when one of gRPC's own is under way.
KEEPALIVE_S = 15.0
IDLE_TIMEOUT_S = 4.0


def test_after_a_cut_the_newest_observation_is_answered_and_nothing_twice(lab: Lab) -> None:
    with (
        CuttableLink(lab.address) as link,
        InferenceClient(link.address) as far,
        InferenceClient(lab.address) as client,
        far.act_stream(lab.open_session(far, "far").session_id) as stream,
    ):
        near = Robot(lab, client, "near")
        lab.ask(stream, 1)
        assert isinstance(next_reply(stream).result, Chunk)
        seen = len(near.replies)
        link.cut()
        cut_s = time.monotonic()
        sent: dict[int, int] = {}
        for seed in range(2, 8):  # The robot goes on looking, and gives each observation little time.
            sent[lab.ask(stream, seed, deadline_s=0.2)] = seed
            assert stream.receive(0.2) is None
        wait_until(lambda: near.chunks_since(seen) > 5)
        assert time.monotonic() - cut_s > 1.0
        link.mend()
        newest = lab.ask(stream, 8)
        sent[newest] = 8
        replies: dict[int, Reply] = {}
        while newest not in replies:
            reply = next_reply(stream)
            assert reply.request_id not in replies
            replies[reply.request_id] = reply
        assert sorted(replies) == sorted(sent), "each is answered once"
        last = replies[newest].result
        assert isinstance(last, Chunk)
        lab.check_chunk(last.actions, 8)
        near.stop()
        assert near.refusals == []
        assert [session.connected for session in client.status().sessions if session.robot_id == "far"] == [True]


def test_a_dead_peer_is_noticed_by_both_ends_and_by_keepalive_alone(plain_lab: Lab) -> None:
    """Packets vanish: nobody is told that the link is gone."""
    lab = plain_lab
    with CuttableLink(lab.address) as link, InferenceClient(link.address) as far, InferenceClient(lab.address) as client:
        silent = far.act_stream(lab.open_session(far, "silent").session_id)
        moved = lab.open_session(far, "moved")
        with far.act_stream(moved.session_id) as old:
            for seed, stream in enumerate((silent, old)):
                lab.ask(stream, seed)
                assert isinstance(next_reply(stream).result, Chunk)
            link.cut()
            cut_s = time.monotonic()
            # A robot that finds another way does not wait for keepalive: its new stream takes over.
            with client.act_stream(moved.session_id) as new:
                request = 1000  # Ids go on growing.
                while request:
                    lab.ask(new, 5)
                    if isinstance(next_reply(new).result, Chunk):
                        request = 0
                assert time.monotonic() - cut_s < 3.0

            def of_silent() -> list[bool]:
                return [session.connected for session in client.status().sessions if session.robot_id == "silent"]

            assert of_silent() == [True]
            with pytest.raises(Unreachable):
                next_reply(silent, KEEPALIVE_S + 5.0)
            wait_until(lambda: of_silent() != [True], cut_s + KEEPALIVE_S + 5.0 - time.monotonic())
            # Then its session ends as any without a stream, and its name is free.
            wait_until(lambda: of_silent() == [], IDLE_TIMEOUT_S + 2.0)
            lab.open_session(client, "silent")
            assert time.monotonic() - cut_s < KEEPALIVE_S + IDLE_TIMEOUT_S + 6.0
