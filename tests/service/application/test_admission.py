"""Budgets of tokens: bounded, fair, and never lost."""

import asyncio

import pytest

from ferryman_service.application.admission import (
    Admission,
    Held,
    TokenBudget,
    cost_tokens,
    expected_tokens,
    in_portions,
)
from ferryman_service.domain.errors import InvalidRequest, QueueFull
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


@pytest.mark.parametrize(
    ("source_tokens", "max_length", "booked"), [(20, 50, 20), (20, 30, 20), (3, 256, 123), (3, 5, 3)]
)
def test_sentence_is_booked_with_its_maximum_length(source_tokens, max_length, booked):
    """The default, 2 n + 10, costs n; a longer one in proportion."""
    sentence = PreparedSentence(source=(1,) * source_tokens, max_length=max_length)
    assert cost_tokens(sentence, SearchOptions(beam_size=32, beam_patience=10)) == 32 * booked


def test_expected_cost_follows_the_maximum_length_up_to_its_limit():
    options = SearchOptions(beam_size=2, max_length=4096)
    assert expected_tokens(["one"], (), options) == 2 * 2043
    assert expected_tokens(["one", "two"], (), options, 256) == 2 * 2 * 123
    assert expected_tokens(["four" * 300], (), options, 256) == 2 * 301


def test_words_that_a_translation_must_begin_with_cost_too_unless_there_is_nothing_to_translate():
    prefix = (3,) * 40
    assert cost_tokens(PreparedSentence(source=(1, 2), prefix=prefix), SearchOptions(beam_size=2)) == 80
    assert cost_tokens(PreparedSentence(source=(), prefix=prefix), SearchOptions(beam_size=2)) == 1


def test_expected_cost_grows_with_texts_prefixes_and_rows():
    greedy = SearchOptions(beam_size=1)
    assert expected_tokens(["12345678", ""], (), greedy) == 4
    assert expected_tokens(["1"] * 9, (), greedy) == 18
    assert expected_tokens(["12345678", ""], ["1234", ""], greedy) == 5
    assert expected_tokens(["12345678", ""], ["1234", ""], SearchOptions(beam_size=5)) == 25


def test_expected_cost_covers_the_minimum_length():
    options = SearchOptions(beam_size=4, min_length=250)
    assert expected_tokens(["one"] * 250, (), options) == 250 * 250 * 4
    assert expected_tokens(["four" * 300, ""], (), options) == (301 + 1) * 4


@pytest.mark.parametrize(
    ("text", "subwords"),
    [("我们在长城上走了一整天", 12), ("東京タワー", 6), ("Ein schöner Tag!", 5), ("Долгая дорога", 7), ("\ud800", 2)],
)
def test_characters_of_scripts_without_spaces_are_expected_to_be_a_subword_each(text, subwords):
    assert expected_tokens([text], (), SearchOptions(beam_size=1)) == subwords


def test_a_call_that_finds_no_room_is_refused():
    admission = Admission(100)
    first, _ = admission.admit(60), admission.admit(40)
    with pytest.raises(QueueFull, match="1 row tokens") as caught:
        admission.admit(1)
    assert caught.value.metadata == {"request_tokens": "1", "queued_tokens": "100", "limit_tokens": "100"}
    first.release()
    admission.admit(60)
    assert admission.calls.used == 100


def test_under_steady_load_a_large_call_is_admitted_as_soon_as_a_small_one():
    """Small calls come whenever there is room, so that the budget is never empty, nor has room for the large one."""
    admission = Admission(100)
    small = [admission.admit(5) for _ in range(20)]
    with pytest.raises(QueueFull):
        admission.admit(90)
    small.pop().release()
    large = admission.admit(90)
    with pytest.raises(QueueFull):
        admission.admit(1)
    assert admission.calls.used < 200
    for held in small:
        held.release()
    admission.admit(5)
    large.release()
    assert admission.calls.used == 5


def test_a_call_over_the_whole_budget_is_told_the_limit_however_little_waits():
    admission = Admission(100)
    admission.check_size(100)
    with pytest.raises(InvalidRequest, match=r"take 101 row tokens .* at most 100 \(--queue-tokens\)") as caught:
        admission.check_size(101)
    assert [(v.field, v.reason) for v in caught.value.violations] == [("sentences", "TOO_MANY_TOKENS")]


async def test_expected_cost_over_the_budget_counts_as_all_of_it():
    admission = Admission(100)
    held = admission.admit(10**9)
    assert admission.calls.used == 100
    await held.settle(70)
    assert admission.calls.used == 70, "what it does cost is known now"
    held.release()
    assert admission.calls.used == 0


async def test_reservation_is_released_once_or_transferred():
    budget = TokenBudget(100)
    held = Held(budget, 100)
    assert budget.try_take(100)
    waiting = asyncio.create_task(budget.take(10))
    await asyncio.sleep(0)
    await held.settle(99)
    await asyncio.wait_for(waiting, 5)
    assert budget.used == 109
    held.hand_over()
    held.release()
    assert budget.used == 109
    other = Held(budget, 10)
    other.release(), other.release()
    assert budget.used == 99


async def test_cost_far_over_the_expected_waits_for_capacity_before_others():
    """100 calls that are expected to cost 1 each, and cost 90 each."""
    admission = Admission(100)
    budget = admission.calls
    held = [admission.admit(1) for _ in range(100)]
    settled = []

    async def run(number):
        await held[number].settle(90)
        settled.append(number)
        assert budget.used <= 200
        if number < 90:
            with pytest.raises(QueueFull):
                admission.admit(1)
        await asyncio.sleep(0)
        held[number].release()

    async with asyncio.timeout(10):
        await asyncio.gather(*map(run, range(100)))
    assert settled == list(range(100))
    assert budget.used == 0


async def test_cancelled_waiter_holds_no_reservation():
    admission = Admission(100)
    held, *others = [admission.admit(1), admission.admit(98), admission.admit(100)]
    waiting = asyncio.create_task(held.settle(60))
    await asyncio.sleep(0)
    assert (waiting.done(), admission.calls.used) == (False, 198), "who waits holds nothing"
    waiting.cancel()
    await asyncio.wait((waiting,))
    held.release()
    assert admission.calls.used == 198
    for other in others:
        other.release()
    assert admission.calls.used == 0


async def test_the_delay_counts_those_who_wait_already():
    clock = FakeClock()
    admission = Admission(100, clock)
    held = [admission.admit(50), admission.admit(50)]
    clock.now_s += 1
    held.pop().release()
    held += [admission.admit(40), admission.admit(100)]
    with pytest.raises(QueueFull) as before:
        admission.admit(10)
    waiting = asyncio.create_task(held[1].settle(90))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull) as after:
        admission.admit(10)
    assert (before.value.retry_delay_s, after.value.retry_delay_s) == (pytest.approx(2.0), pytest.approx(3.0))
    held.pop().release()
    await asyncio.wait_for(waiting, 5)


def test_peer_within_its_share_is_not_refused_whatever_others_have_borrowed():
    admission = Admission(100)
    first = [admission.admit(10, "a") for _ in range(10)]
    with pytest.raises(QueueFull):
        admission.admit(1, "a")
    neighbour = admission.admit(50, "b")
    with pytest.raises(QueueFull):
        admission.admit(1, "b")
    admission.admit(33, "c").release()
    with pytest.raises(QueueFull):
        admission.admit(34, "c")
    for held in (*first, neighbour):
        held.release()
    assert (admission.calls.used, admission.calls._used) == (0, {})
    admission.admit(100, "b"), admission.admit(50, "a")


async def test_peer_that_waits_with_least_is_served_first():
    budget = TokenBudget(90)
    await budget.take(90, "a")
    order = []

    async def take(name, tokens):
        await budget.take(tokens, name[0])
        order.append(name)

    waiting = [asyncio.create_task(take(*item)) for item in (("a1", 10), ("a2", 10), ("b1", 60), ("b2", 1))]
    await asyncio.sleep(0)
    assert order == [], "60 is more than half, and nobody overtakes within a peer"
    budget.give_back(10, "a")
    await asyncio.sleep(0)
    assert order == ["b1"]
    budget.give_back(80, "a")
    async with asyncio.timeout(5):
        await asyncio.gather(*waiting)
    assert order[1:] == ["a1", "a2", "b2"]
    budget.give_back(20, "a"), budget.give_back(61, "b")
    assert (budget.used, budget._used, budget._waiting) == (0, {}, {})


def test_streams_and_calls_do_not_shut_each_other_out():
    admission = Admission(100)
    admission.admit(100)
    assert admission.streams.try_take(100)


async def test_streams_wait_in_turn():
    budget = TokenBudget(100)
    await budget.take(100)
    order = []

    async def take(name, tokens):
        await budget.take(tokens)
        order.append(name)

    waiting = [asyncio.create_task(take(*item)) for item in (("large", 98), ("small", 10), ("smaller", 5))]
    await asyncio.sleep(0)
    assert order == []
    budget.give_back(1)
    await waiting[0]
    assert order == ["large"], "what is large waits no longer than what is small"
    await asyncio.sleep(0)
    assert (order, budget.used) == (["large"], 197)
    budget.give_back(98)
    await waiting[1]
    assert order == ["large", "small"]
    budget.give_back(99)
    await waiting[2]
    assert budget.used == 15


async def test_waiter_that_stops_lets_the_next_through():
    budget = TokenBudget(100)
    await budget.take(100)
    first, second = asyncio.create_task(budget.take(90)), asyncio.create_task(budget.take(20))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    budget.give_back(50)
    await asyncio.wait_for(second, 5)
    assert budget.used == 70


@pytest.mark.parametrize(
    ("costs", "portions"),
    [([], []), ([30, 30, 30, 30], [60, 60]), ([200, 1, 64, 64], [200, 65, 64])],
)
def test_portions_hold_no_more_than_they_may_but_for_one_item(costs, portions):
    found = list(in_portions(list(enumerate(costs)), 65))
    assert [tokens for _, tokens in found] == portions
    assert [item for group, _ in found for item in group] == list(range(len(costs)))


async def test_waiter_cancelled_when_served_gives_back():
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
