"""Budgets of tokens: bounded, fair, and never lost."""

import asyncio

import pytest

from ferryman_service.application.admission import Admission, TokenBudget, cost_tokens
from ferryman_service.domain.errors import QueueFull
from ferryman_service.domain.translation import PreparedSentence, Sampling, SearchOptions


class FakeClock:
    """Tells the seconds that a test sets."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.mark.parametrize(
    ("source_tokens", "options", "tokens"),
    [
        (7, SearchOptions(beam_size=5), 35),
        (7, SearchOptions(beam_size=1), 7),
        (7, SearchOptions(n_best=3, sampling=Sampling()), 21),
        (0, SearchOptions(), 1),
    ],
)
def test_a_sentence_costs_its_rows(source_tokens, options, tokens):
    assert cost_tokens(PreparedSentence(source=(1,) * source_tokens), options) == tokens


def test_a_translation_that_must_be_long_costs_its_length():
    sentence = PreparedSentence(source=(1, 2), min_length=4000, max_length=4096)
    assert cost_tokens(sentence, SearchOptions(beam_size=3)) == 12_000


def test_a_call_that_finds_no_room_is_refused():
    admission = Admission(100)
    admission.admit(60)
    admission.admit(40)
    with pytest.raises(QueueFull, match="1 row tokens") as caught:
        admission.admit(1)
    assert caught.value.metadata == {"request_tokens": "1", "queued_tokens": "100", "limit_tokens": "100"}
    admission.calls.give_back(60)
    admission.admit(60)
    assert admission.calls.used == 100


def test_what_is_larger_than_all_passes_when_nothing_else_is_there():
    admission = Admission(100)
    admission.admit(1000)
    with pytest.raises(QueueFull):
        admission.check(1)
    admission.calls.give_back(1000)
    admission.admit(1)
    with pytest.raises(QueueFull):
        admission.admit(1000)


def test_a_check_takes_nothing():
    admission = Admission(100)
    admission.check(100)
    assert admission.calls.used == 0


def test_streams_and_calls_do_not_shut_each_other_out():
    admission = Admission(100)
    admission.admit(100)
    assert admission.streams.try_take(100)


async def test_streams_wait_in_turn():
    budget = TokenBudget(100)
    await budget.take(80)
    order = []

    async def take(name, tokens):
        await budget.take(tokens)
        order.append(name)

    waiting = [asyncio.create_task(take(*item)) for item in (("large", 90), ("small", 10), ("smaller", 5))]
    await asyncio.sleep(0)
    assert order == [], "a small one does not overtake a large one, or that would wait for ever"
    budget.give_back(80)
    await asyncio.gather(*waiting[:2])
    assert order == ["large", "small"]
    assert budget.used == 100
    budget.give_back(10)
    await waiting[2]
    assert budget.used == 95


async def test_who_stops_waiting_lets_the_next_through():
    budget = TokenBudget(100)
    await budget.take(80)
    large = asyncio.create_task(budget.take(90))
    small = asyncio.create_task(budget.take(20))
    await asyncio.sleep(0)
    large.cancel()
    await asyncio.wait_for(small, 5)
    assert budget.used == 100
    budget.give_back(100)
    await budget.take(100)


async def test_who_is_cancelled_just_when_it_is_served_gives_back():
    budget = TokenBudget(100)
    await budget.take(100)
    waiting = asyncio.create_task(budget.take(50))
    await asyncio.sleep(0)
    budget.give_back(100)  # serves it; it has not run since
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert budget.used == 0


def test_the_delay_follows_the_drain():
    clock = FakeClock()
    admission = Admission(1000, clock)
    admission.admit(1000)
    for _ in range(50):
        clock.now_s += 0.1
        admission.calls.give_back(20)
        admission.admit(20)
    with pytest.raises(QueueFull) as caught:
        admission.admit(400)
    assert caught.value.retry_delay_s == pytest.approx(2.0, rel=0.01)  # 400 tokens at 200 a second


def test_idle_time_does_not_count_as_slowness():
    clock = FakeClock()
    budget = TokenBudget(100, clock)
    assert budget.try_take(100)
    clock.now_s += 1
    budget.give_back(100)
    clock.now_s += 3600
    assert budget.try_take(100)
    clock.now_s += 1
    budget.give_back(100)
    assert budget.try_take(100)
    assert budget.delay_s(50) == pytest.approx(0.5)


@pytest.mark.parametrize(("rate", "delay_s"), [(None, 1.0), (1e9, 0.1), (1e-3, 30.0)])
def test_the_delay_is_bounded(rate, delay_s):
    clock = FakeClock()
    budget = TokenBudget(100, clock)
    if rate is not None:
        assert budget.try_take(100)
        clock.now_s += 100 / rate
        budget.give_back(100)
    assert budget.try_take(100)
    assert budget.delay_s(100) == pytest.approx(delay_s)


def test_more_cannot_be_given_back_than_was_taken():
    budget = TokenBudget(100)
    assert budget.try_take(5)
    with pytest.raises(AssertionError):
        budget.give_back(6)
