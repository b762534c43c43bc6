"""Streams over the real store: history then life, no gap, no duplicate, an end."""

import asyncio
import time

import pytest

from ferryman_service.application.metrics_feed import FeedConfig, Heartbeat, MetricsFeed
from ferryman_service.domain.errors import InvalidRequest, RunNotFound, SequenceOutOfRange
from ferryman_service.domain.records import EventLevel, RunEvent, RunState, StateChange
from ferryman_service.domain.threads import Threads
from tests.fakes.busy_threads import busy_threads


def event(text):
    return RunEvent(level=EventLevel.INFO, code="TEST", message=text)


@pytest.fixture
def feed(runs):
    return MetricsFeed(runs, FeedConfig(poll_interval_s=0.01, heartbeat_s=30), Threads(2, "feed"))


async def collect(stream):
    return [item async for item in stream]


async def test_a_finished_run_is_all_history(runs, feed, running_run):
    run = running_run()
    runs.append(run.run_id, 1, [event(str(n)) for n in range(1200)], None)
    runs.change_state(run.run_id, 1, RunState.CANCELLED)
    records = await collect(feed.stream(run.run_id, 0, follow=True))
    assert [record.sequence for record in records] == list(range(1, 1205))
    assert records[-1].payload == StateChange(state=RunState.CANCELLED, attempt=1)


async def test_any_point_of_the_history_can_be_resumed(runs, feed, running_run):
    run = running_run()
    runs.append(run.run_id, 1, [event(str(n)) for n in range(5)], None)
    runs.change_state(run.run_id, 1, RunState.CANCELLED)
    whole = await collect(feed.stream(run.run_id, 0, follow=True))
    for after in range(len(whole) + 1):
        assert await collect(feed.stream(run.run_id, after, follow=True)) == whole[after:]


async def test_history_only_ends_where_the_history_ended(runs, feed, running_run):
    run = running_run()
    records = await collect(feed.stream(run.run_id, 0, follow=False))
    assert [record.sequence for record in records] == [1, 2, 3]


async def test_live_records_arrive_once_in_order_within_a_quarter_second(runs, feed, running_run):
    run = running_run()
    delays_s = []

    async def write():
        for n in range(30):
            stamp = f"{n} {time.monotonic()}"
            await asyncio.to_thread(runs.append, run.run_id, 1, [event(stamp), event(stamp)], None)
            await asyncio.sleep(0.01)
        await asyncio.to_thread(runs.change_state, run.run_id, 1, RunState.CANCELLED)

    writer = asyncio.create_task(write())
    sequences = []
    async for record in feed.stream(run.run_id, 3, follow=True):
        sequences.append(record.sequence)
        if isinstance(record.payload, RunEvent):
            delays_s.append(time.monotonic() - float(record.payload.message.split()[1]))
    await writer
    assert sequences == list(range(4, 4 + 60 + 1))
    assert sorted(delays_s)[len(delays_s) // 2] < 0.25


async def test_many_streams_of_one_run_see_the_same(runs, feed, running_run):
    run = running_run()
    streams = [asyncio.create_task(collect(feed.stream(run.run_id, 0, follow=True))) for _ in range(20)]
    for n in range(10):
        await asyncio.to_thread(runs.append, run.run_id, 1, [event(str(n))], None)
    await asyncio.to_thread(runs.change_state, run.run_id, 1, RunState.FAILED)
    everything = await asyncio.gather(*streams)
    assert all(records == everything[0] for records in everything)
    assert len(everything[0]) == 14


async def test_other_work_does_not_keep_records_waiting(runs, feed, running_run):
    run = running_run()
    async with busy_threads(), asyncio.timeout(20):
        stream = feed.stream(run.run_id, 3, follow=True)
        runs.append(run.run_id, 1, [event("news")], None)
        assert (await anext(stream)).payload == event("news")
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.1)  # it has found nothing, and waits to be told
        runs.append(run.run_id, 1, [event("more")], None)
        assert (await waiting).payload == event("more")
        await stream.aclose()


async def test_silence_is_broken_by_heartbeats(runs, running_run):
    run = running_run()
    feed = MetricsFeed(runs, FeedConfig(poll_interval_s=0.01, heartbeat_s=0.02), Threads(2, "feed"))
    stream = feed.stream(run.run_id, 3, follow=True)
    assert await anext(stream) == Heartbeat(last_sequence=3, state=RunState.RUNNING, interval_s=0.02)
    runs.append(run.run_id, 1, [event("news")], None)
    later = [await anext(stream) for _ in range(3)]
    assert sum(not isinstance(item, Heartbeat) for item in later) == 1
    await stream.aclose()


async def test_a_stream_that_is_left_stops_the_polling(runs, feed, running_run):
    run = running_run()
    stream = feed.stream(run.run_id, 0, follow=True)
    await anext(stream)
    await stream.aclose()
    async with asyncio.timeout(2):
        await feed._poller


@pytest.mark.parametrize(
    ("run_id", "after", "error"),
    [("run_unknown", 0, RunNotFound), ("", 0, InvalidRequest), ("run_unknown", -1, InvalidRequest)],
)
async def test_unknown_run_or_bad_position_is_refused(feed, run_id, after, error):
    with pytest.raises(error):
        await anext(feed.stream(run_id, after, follow=True))


async def test_a_position_beyond_the_end(feed, running_run):
    with pytest.raises(SequenceOutOfRange) as caught:
        await anext(feed.stream(running_run().run_id, 4, follow=True))
    assert caught.value.metadata == {"after_sequence": "4", "last_sequence": "3"}
