"""Fan-out by cursors: every viewer sees all news, in order, and a slow one holds nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from services.dashboard.feed import Feed


def apply(page: dict[str, list[Any]], changes: dict[str, Any]) -> None:
    """What the page's script does with a message."""
    for topic, change in changes.items():
        before = [] if change["reset"] else page.get(topic, [])
        page[topic] = (before + change["values"])[-change["keep"] :]


def test_a_new_viewer_gets_everything_and_then_only_news() -> None:
    feed = Feed()
    feed.set("robot", {"mode": "idle"})
    for tick in range(5):
        feed.append("samples", tick, keep=3)
    position, changes = feed.since(0)
    assert changes["robot"] == {"reset": True, "keep": 1, "values": [{"mode": "idle"}]}
    assert changes["samples"]["values"] == [2, 3, 4]
    assert feed.since(position) == (position, {})
    feed.append("samples", 5, keep=3)
    assert feed.since(position)[1] == {"samples": {"reset": False, "keep": 3, "values": [5]}}


def test_an_equal_value_is_no_news() -> None:
    feed = Feed()
    feed.set("robot", {"mode": "idle"})
    position, _ = feed.since(0)
    feed.set("robot", {"mode": "idle"})
    assert feed.since(position)[1] == {}
    feed.set("robot", {"mode": "active"})
    assert feed.since(position)[1]["robot"]["values"] == [{"mode": "active"}]


def test_pages_that_read_at_different_times_end_up_equal() -> None:
    feed = Feed()
    quick: dict[str, list[Any]] = {}
    slow: dict[str, list[Any]] = {}
    quick_at = slow_at = 0
    for step in range(40):
        feed.append("points", step, keep=10)
        if step == 20:
            feed.clear("points")
        if step % 3 == 0:
            feed.set("status", step)
        quick_at, changes = feed.since(quick_at)
        apply(quick, changes)
        if step in (5, 22):
            slow_at, changes = feed.since(slow_at)
            apply(slow, changes)
    slow_at, changes = feed.since(slow_at)
    apply(slow, changes)
    assert quick == slow == {"points": list(range(30, 40)), "status": [39]}


def test_clearing_is_told_although_nothing_follows() -> None:
    feed = Feed()
    feed.append("points", 1, keep=10)
    page: dict[str, list[Any]] = {}
    position, changes = feed.since(0)
    apply(page, changes)
    feed.clear("points")
    apply(page, feed.since(position)[1])
    assert page == {"points": []}


async def test_following_wakes_at_once_and_gives_signs_of_life() -> None:
    feed = Feed()
    messages = feed.follow(interval_s=0.0, idle_s=0.05)
    assert (await anext(messages))["topics"] == {}
    assert (await anext(messages))["topics"] == {}, "a sign of life"
    waiting = asyncio.ensure_future(anext(feed.follow(interval_s=0.0, idle_s=30.0)))
    await waiting
    follower = feed.follow(interval_s=0.0, idle_s=30.0)
    await anext(follower)
    second = asyncio.ensure_future(anext(follower))
    await asyncio.sleep(0)
    feed.set("robot", 1)
    assert (await asyncio.wait_for(second, 1.0))["topics"]["robot"]["values"] == [1]


def test_viewers_are_counted_also_when_one_fails() -> None:
    feed = Feed()
    with feed.viewing():
        try:
            with feed.viewing():
                assert feed.num_viewers == 2
                raise ConnectionError
        except ConnectionError:
            pass
        assert feed.num_viewers == 1
    assert feed.num_viewers == 0
