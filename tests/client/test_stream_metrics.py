"""A stream of metrics survives its server."""

from __future__ import annotations

import threading

import pytest

from ferryman import AsyncClient, Client, errors
from ferryman._tail import MetricsTail
from ferryman.testing import FakeFerryman, training_script
from ferryman.types import Heartbeat, RunState


def start_held_run(fake: FakeFerryman, client: Client) -> str:
    corpus = client.upload_corpus("toy", "en", "de", train=[("a", "b")], validation=[("c", "d")])
    return client.start_training(corpus.corpus_id, "m").run_id


def test_stream_resumes_after_server_restart():
    script = training_script(steps=300)
    with FakeFerryman(script=script, hold_after=150) as fake, Client(fake.target) as client:
        run_id = start_held_run(fake, client)
        sequences = []
        for record in client.stream_metrics(run_id):
            sequences.append(record.sequence)
            if record.sequence == 100:
                fake.stop()
                fake.start()
            if record.sequence == 150:
                fake.stop()
                restart = threading.Timer(0.3, lambda: (fake.start(), fake.release(run_id)))
                restart.start()
        restart.join()
        assert sequences == list(range(1, len(script) + 1))
        assert fake.calls.count("StreamMetrics") >= 2


async def test_async_stream_resumes_after_server_restart():
    script = training_script(steps=300)
    with FakeFerryman(script=script, hold_after=150) as fake:
        with Client(fake.target) as client:
            run_id = start_held_run(fake, client)
        async with AsyncClient(fake.target) as client:
            sequences = []
            async for record in client.stream_metrics(run_id):
                sequences.append(record.sequence)
                if record.sequence == 150:
                    fake.stop()
                    fake.start()
                    fake.release(run_id)
        assert sequences == list(range(1, len(script) + 1))


def test_stream_raises_unavailable_after_reconnect_timeout(fake, client, corpus):
    fake.hold_after = 4
    run_id = client.start_training(corpus.corpus_id, "m").run_id
    stream = client.stream_metrics(run_id, reconnect_timeout_s=0.3)
    assert [next(stream).sequence for _ in range(4)] == [1, 2, 3, 4]
    fake.stop()
    with pytest.raises(errors.Unavailable):
        next(stream)


def test_other_errors_end_the_stream_at_once(fake, client, corpus):
    run_id = client.start_training(corpus.corpus_id, "m").run_id
    with pytest.raises(errors.SequenceOutOfRange):
        next(client.stream_metrics(run_id, 99))
    with pytest.raises(errors.RunNotFound):
        client.wait("run_x")
    assert fake.calls.count("StreamMetrics") == 2


def test_repeated_record_is_skipped(client, corpus):
    run_id = client.start_training(corpus.corpus_id, "m").run_id
    records = list(client.stream_metrics(run_id))
    tail = MetricsTail(run_id, 0, follow=True, reconnect_timeout_s=1)
    assert [tail.accept(record) for record in [records[0], records[1], records[1], records[2]]] == [
        True,
        True,
        False,
        True,
    ]
    assert tail.call().request.after_sequence == 3


def test_backoff_is_bounded_and_reset_by_a_response():
    now_s = 0.0
    tail = MetricsTail("r", 0, follow=True, reconnect_timeout_s=60, clock=lambda: now_s)
    gone = errors.Unavailable("gone")
    delays_s = []
    for _ in range(9):
        delays_s.append(tail.next_delay_s(gone))
        now_s += delays_s[-1]
    assert 0.05 <= delays_s[0] <= 0.1
    assert all(2.5 <= delay_s <= 5 for delay_s in delays_s[-2:])
    tail.accept(Heartbeat(last_sequence=0, state=RunState.RUNNING, interval_s=1))
    now_s += 1000
    assert tail.next_delay_s(gone) <= 0.1
    now_s += 61
    with pytest.raises(errors.Unavailable):
        tail.next_delay_s(gone)
