"""The scenarios of the serving replicas: rolling restart, a killed replica, a promoted version, a slow replica."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bench.rehearsal.cluster import Cluster
from bench.rehearsal.effort import Effort
from bench.rehearsal.load import (
    OK,
    Ledger,
    Line,
    Load,
    Trickle,
    Work,
    raw_caller,
    sdk_caller,
    trickle,
)
from bench.rehearsal.pods import Ending, Pod
from bench.rehearsal.report import Report

_LONG: Final = Work(sentences=16)
_CALLERS: Final = 6
_STREAMS: Final = 6
_BEFORE_DEATH_S: Final = 0.5
_DEADLINE_S: Final = 2.0
_HEALTH_TIMEOUT_S: Final = 60.0
# A call that begins so long after a process is gone cannot have been sent to it.
_REACHED_S: Final = 0.05
_ALL_ON_NEW_WITHIN_S: Final = 5.0
_BACK_WITHIN_S: Final = 10.0
# For what looks from outside, on a machine with other things to do.
_SLACK_S: Final = 2.0
_SLOW_RUNS_S, _SLOW_STANDS_S = 0.02, 0.18


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A replica's death: when it was killed, gone, and ready again, seconds of time.monotonic, and what callers saw."""

    killed_s: float
    gone_s: float
    restarted_s: float
    raw: Ledger
    sdk: Ledger
    streams: Sequence[Trickle]

    def in_flight(self) -> list[Line]:
        """Return the calls without retries that had begun, at any replica, and not ended when it died."""
        last_s = self.gone_s + _REACHED_S
        return [line for line in self.raw.lines if line.begun_s <= last_s and line.ended_s >= self.killed_s]

    def failed(self) -> list[Line]:
        """Return the calls without retries that failed."""
        return [line for line in self.raw.lines if line.answer.status != OK]


@contextlib.asynccontextmanager
async def translating_through_envoy(cluster: Cluster, effort: Effort) -> AsyncIterator[tuple[Trickle, Load]]:
    """Translate a stream, and single calls without retries, for the length of the block."""
    target = cluster.envoy.target
    async with (
        raw_caller(target) as caller,
        trickle(target, cluster.sentences) as stream,
        Load(caller, cluster.sentences, Work(), rate=effort.rate) as load,
    ):
        yield stream, load


async def rolling_restart(cluster: Cluster, effort: Effort) -> Report:
    """Restart replica after replica while callers that never retry translate, and while a stream is translated."""
    report = Report("a", "every replica restarted in turn; through Envoy, callers without retries")
    endings, restarted_s, out_s = list[Ending](), dict[str, float](), list[float]()
    async with translating_through_envoy(cluster, effort) as (stream, load):
        await load.answered(effort.settle_calls)
        farewells = -await cluster.envoy.farewells()
        for pod in cluster.serving:
            out_s.append(await _replace(cluster, pod, endings))
            restarted_s[pod.target] = time.monotonic()
            await load.answered(effort.settle_calls)
            await _wait_for(lambda: _back(load.ledger, restarted_s) == set(restarted_s), _BACK_WITHIN_S)
        farewells += await cluster.envoy.farewells()
    report.count(load.ledger, cluster.expected)
    report.must_not_fail(load.ledger)
    aged = farewells - len(cluster.serving)
    report.must("meanwhile connections reach their age and are replaced", f"{aged} or more", aged > 0)
    report.figures["seconds_until_envoy_knew"] = [round(seconds, 1) for seconds in out_s]
    drain_s, notices_s = cluster.serving[0].template.drain_s, cluster.envoy.notices_within_s
    text = "the chart's drain is as long as Envoy needs to notice"
    report.must(text, f"{drain_s:g} s, {notices_s:g} s", drain_s >= notices_s)
    _check_endings(report, endings)
    _check_return(report, load.ledger, restarted_s)
    _check_stream(report, stream, cluster.expected.values())
    return report


async def killed_replica(cluster: Cluster, effort: Effort) -> Report:
    """Kill a replica under the eyes of callers that never retry and of others that use the SDK."""
    report = Report("b", "one replica killed with SIGKILL; through Envoy")
    victim = cluster.serving[-1]
    kill = await _kill(cluster, victim, cluster.envoy.target, effort)
    _check_kill(report, kill, cluster)
    replicas = sorted({line.answer.replica for line in kill.failed()})
    report.must("all that failed were at that replica", replicas, replicas == [victim.target])
    _check_return(report, kill.raw, {victim.target: kill.restarted_s})
    return report


async def killed_replica_headless(cluster: Cluster, effort: Effort) -> Report:
    """The same without Envoy: the clients know all replicas and take them in turn."""
    report = Report("f", "one replica killed with SIGKILL; no Envoy, clients take the replicas in turn")
    kill = await _kill(cluster, cluster.serving[-1], cluster.headless, effort)
    _check_kill(report, kill, cluster)
    return report


async def promoted_version(cluster: Cluster, effort: Effort) -> Report:
    """Publish a version beside the running replicas, and move the alias to it, back, and to it again."""
    report = Report("c", "a new version published and promoted everywhere; through Envoy, callers without retries")
    async with translating_through_envoy(cluster, effort) as (stream, load):
        await load.answered(effort.settle_calls)
        old = next(iter(cluster.expected))
        new = await cluster.publish(2)
        for reference in (new, old, new):  # the first time no replica has it in memory
            is_cold = reference not in cluster.expected
            moved_s = await _move(cluster, load, reference, effort)
            _check_promotion(report, load.ledger, reference, moved_s, cluster, is_cold=is_cold)
            if is_cold:
                await cluster.learn(reference)
    report.count(load.ledger, cluster.expected)
    report.must_not_fail(load.ledger)
    same = sum(cluster.expected[old][text] == cluster.expected[new][text] for text in cluster.sentences)
    report.must("the versions' translations differ", f"{same} of {len(cluster.sentences)} are the same", same == 0)
    _check_stream(report, stream, [cluster.expected[old]])
    return report


async def _move(cluster: Cluster, load: Load, reference: str, effort: Effort) -> float:
    """Move the alias, and wait until every replica has answered with its new target. Return when it was moved."""
    await cluster.promote(int(reference.rpartition("/")[2]))
    moved_s = time.monotonic()
    await load.answered(effort.settle_calls)
    replicas = len(cluster.serving)
    await _wait_for(lambda: len(_first_answers_s(load.ledger, reference, moved_s)) == replicas, _ALL_ON_NEW_WITHIN_S)
    return moved_s


async def slow_replica(cluster: Cluster, effort: Effort) -> Report:
    """Let one replica stand still for a while, then let it crawl; callers have deadlines."""
    report = Report("d", "one replica stands still, then crawls; through Envoy, callers with a deadline of 2 s")
    victim = cluster.serving[1]
    work = Work(timeout_s=_DEADLINE_S)
    async with (
        raw_caller(cluster.envoy.target) as caller,
        Load(caller, cluster.sentences, work, rate=effort.rate) as load,
    ):
        await asyncio.sleep(effort.window_s)
        stopped_s = time.monotonic()
        with victim.frozen():
            out_s = stopped_s + await cluster.envoy.wait_for(victim, healthy=False, timeout_s=_HEALTH_TIMEOUT_S)
            await asyncio.sleep(effort.window_s)
            woken_s = time.monotonic()
        back_s = woken_s + await cluster.envoy.wait_for(victim, healthy=True, timeout_s=_HEALTH_TIMEOUT_S)
        await load.answered(effort.settle_calls)
    report.count(load.ledger, cluster.expected)
    _check_standstill(report, load.ledger, (stopped_s, out_s, woken_s, back_s), cluster.envoy.notices_within_s)
    await _crawl(report, cluster, victim, effort)
    return report


async def _replace(cluster: Cluster, pod: Pod, endings: list[Ending]) -> float:
    """End a pod and start it again, as a rolling update does, and wait until Envoy sends it calls. Return the seconds
    from the beginning of its end until Envoy sent it no more."""
    deleting = asyncio.create_task(pod.delete())
    out_s = await cluster.envoy.wait_for(pod, healthy=False, timeout_s=_HEALTH_TIMEOUT_S)
    endings.append(await deleting)
    await pod.start()
    await cluster.envoy.wait_for(pod, healthy=True, timeout_s=_HEALTH_TIMEOUT_S)
    return out_s


async def _kill(cluster: Cluster, victim: Pod, target: str, effort: Effort) -> Kill:
    """Kill a replica while callers of all kinds keep all replicas busy, and start it again."""
    async with contextlib.AsyncExitStack() as stack:
        raw = await stack.enter_async_context(raw_caller(target))
        sdk = await stack.enter_async_context(sdk_caller(target))
        streams = [await stack.enter_async_context(trickle(target, cluster.sentences)) for _ in range(_STREAMS)]
        load = await stack.enter_async_context(Load(raw, cluster.sentences, _LONG, callers=_CALLERS))
        sdk_load = await stack.enter_async_context(Load(sdk, cluster.sentences, _LONG, callers=_CALLERS, seed=2))
        await load.answered(effort.settle_calls)
        with victim.frozen():  # so that it has calls in flight when it dies
            await asyncio.sleep(_BEFORE_DEATH_S)
            killed_s = time.monotonic()
            await victim.kill()
        gone_s = time.monotonic()
        await load.answered(effort.settle_calls)
        await victim.start()
        restarted_s = time.monotonic()
        await cluster.envoy.wait_for(victim, healthy=True, timeout_s=_HEALTH_TIMEOUT_S)
        await load.answered(effort.settle_calls)
        if target == cluster.envoy.target:  # which tells who has answered
            await _wait_for(lambda: bool(_back(load.ledger, {victim.target: restarted_s})), _BACK_WITHIN_S)
    return Kill(
        killed_s=killed_s,
        gone_s=gone_s,
        restarted_s=restarted_s,
        raw=load.ledger,
        sdk=sdk_load.ledger,
        streams=streams,
    )


async def _wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait until a condition holds, or the time for that is over."""
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        await asyncio.sleep(0.05)


async def _crawl(report: Report, cluster: Cluster, victim: Pod, effort: Effort) -> None:
    """Let a replica have a tenth of the processor, with a deadline that it can keep, and note what that costs."""
    async with (
        raw_caller(cluster.envoy.target) as caller,
        Load(caller, cluster.sentences, Work(), rate=effort.rate) as load,
        _crawling(victim),
    ):
        await asyncio.sleep(effort.window_s)
    failures = load.ledger.failures()
    report.figures["p99_ms_while_one_crawls"] = load.ledger.milliseconds(0.99)
    report.must(
        "while it crawls, no call fails or is lost",
        f"{failures.total()} failed {dict(failures) or ''}, {load.ledger.lost} lost of {load.ledger.begun}",
        not failures and not load.ledger.lost,
    )


@contextlib.asynccontextmanager
async def _crawling(pod: Pod) -> AsyncIterator[None]:
    """Let the pod run for a tenth of the time in the block."""

    async def crawl() -> None:
        while True:
            pod.signal(signal.SIGSTOP)
            await asyncio.sleep(_SLOW_STANDS_S)
            pod.signal(signal.SIGCONT)
            await asyncio.sleep(_SLOW_RUNS_S)

    task = asyncio.create_task(crawl())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))
        pod.signal(signal.SIGCONT)


def _check_kill(report: Report, kill: Kill, cluster: Cluster) -> None:
    """Note who has seen a replica die: of the callers without retries those whose calls it had, of the SDK's nobody."""
    report.count(kill.raw, cluster.expected)
    in_flight, failed = kill.in_flight(), kill.failed()
    report.figures |= {"in_flight_at_the_kill": len(in_flight), "sdk_calls": kill.sdk.begun}
    statuses = sorted({line.answer.status for line in failed})
    report.must("without retries, calls in flight there end with UNAVAILABLE", statuses, statuses == ["UNAVAILABLE"])
    others = [line for line in failed if line not in in_flight]
    report.must("no other call fails", f"{len(others)} of {kill.raw.begun - len(in_flight)}", not others)
    failures, wrong = kill.sdk.failures(), kill.sdk.wrong(cluster.expected)
    report.must(
        "with the SDK, no call of Translate fails, none is lost or wrong",
        f"{failures.total()} failed {dict(failures) or ''}, {kill.sdk.lost} lost, {wrong} wrong of {kill.sdk.begun}",
        not (failures or kill.sdk.lost or wrong),
    )
    versions = cluster.expected.values()
    complete = sum(stream.is_complete() and any(not stream.wrong(v) for v in versions) for stream in kill.streams)
    text = "the SDK's streams, there all the time, have one answer for every sentence, each of one version"
    report.must(text, f"{complete} of {len(kill.streams)}", complete == len(kill.streams))


def _check_endings(report: Report, endings: Sequence[Ending]) -> None:
    statuses = [ending.status for ending in endings]
    report.figures["seconds_to_drain"] = [round(ending.seconds, 2) for ending in endings]
    report.must("each ends by itself, exit status 0", statuses, not any(statuses))
    late = sum(not ending.in_time for ending in endings)
    report.must("each ends within its grace period", f"{late} had to be killed", not late)


def _back(ledger: Ledger, restarted_s: Mapping[str, float]) -> set[str]:
    """Return which of those that were started again have answered since."""
    return {
        line.answer.replica
        for line in ledger.lines
        if line.answer.status == OK and line.begun_s > restarted_s.get(line.answer.replica, float("inf"))
    }


def _check_return(report: Report, ledger: Ledger, restarted_s: Mapping[str, float]) -> None:
    back = _back(ledger, restarted_s)
    seen = f"{len(back)} of {len(restarted_s)}"
    report.must("each that was started again answers again", seen, back == set(restarted_s))


def _check_stream(report: Report, stream: Trickle, versions: Iterable[Mapping[str, str]]) -> None:
    """Note whether a stream has lost nothing, and stayed with one of the versions."""
    wrong = min(stream.wrong(version) for version in versions)
    report.must(
        "the SDK's stream, there all the time, has one answer for every sentence, all of one version",
        f"{stream.sent} sent, {len(stream.answers)} answers, {wrong} wrong, {stream.failure or 'no failure'}",
        stream.is_complete() and wrong == 0,
    )


def _first_answers_s(ledger: Ledger, reference: str, since_s: float) -> dict[str, float]:
    """Return when each replica first answered with a version, of those that have, for calls that began since a time."""
    first_s = dict[str, float]()
    for line in ledger.lines:
        if line.answer.model == reference and line.begun_s >= since_s:
            first_s.setdefault(line.answer.replica, line.ended_s)
    return first_s


def _check_promotion(
    report: Report, ledger: Ledger, reference: str, moved_s: float, cluster: Cluster, *, is_cold: bool
) -> None:
    """Note how soon after the move of the alias each replica has answered with its new target, and that none goes back.
    Cold: until a replica has loaded the target, it may still use the version before."""
    first_s = _first_answers_s(ledger, reference, moved_s)
    last_s = max(first_s.values(), default=float("inf")) - moved_s
    how = "which no replica had in memory" if is_cold else "which all have in memory"
    report.must(
        f"all answer with {reference}, {how}, within {_ALL_ON_NEW_WITHIN_S:g} s",
        f"{len(first_s)} within {last_s:.2f} s",
        len(first_s) == len(cluster.serving) and last_s <= _ALL_ON_NEW_WITHIN_S,
    )
    since_s = first_s if is_cold else dict.fromkeys(first_s, moved_s)
    later = [
        line
        for line in ledger.lines
        if line.answer.status == OK and line.begun_s >= since_s.get(line.answer.replica, float("inf"))
    ]
    old = sum(line.answer.model != reference for line in later)
    text = "no call that begins after that has another version" if is_cold else "no call that begins later has another"
    report.must(text, f"{old} of {len(later)}", old == 0)


def _check_standstill(
    report: Report, ledger: Ledger, times_s: tuple[float, float, float, float], notices_within_s: float
) -> None:
    """Note what callers see of a replica that stands still: `times_s` are when it stopped, was taken out of rotation,
    was woken, and was back in it."""
    stopped_s, out_s, woken_s, back_s = times_s
    limit_s = notices_within_s + _SLACK_S
    report.figures |= {
        "p99_ms_before": ledger.milliseconds(0.99, last_s=stopped_s),
        "p99_ms_of_the_answered_until_out": ledger.milliseconds(0.99, stopped_s, out_s),
        "p99_ms_while_out": ledger.milliseconds(0.99, out_s, woken_s),
    }
    failed = [line for line in ledger.lines if line.answer.status != OK]
    statuses = sorted({line.answer.status for line in failed})
    report.must("calls at it end with DEADLINE_EXCEEDED", statuses, statuses == ["DEADLINE_EXCEEDED"])
    longest_s = max((line.ended_s - line.begun_s for line in failed), default=0.0)
    in_time = longest_s <= _DEADLINE_S + 0.5
    report.must("and do so at their deadline", f"the longest after {longest_s:.2f} s", in_time)
    later = [line for line in failed if not stopped_s - _DEADLINE_S <= line.begun_s <= out_s + _REACHED_S]
    report.must("no call fails that began after it was taken out", len(later), not later)
    taken_s, returned_s = out_s - stopped_s, back_s - woken_s
    report.must(f"it is taken out within {limit_s:g} s", f"{taken_s:.1f} s", taken_s <= limit_s)
    report.must(f"it is back within {limit_s:g} s", f"{returned_s:.1f} s", returned_s <= limit_s)
