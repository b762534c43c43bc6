"""The processor time of two checkouts, by turns: a run of the preset `tiny`, and 200 sentences translated greedily.

    python -m tests.golden.speed OLD_FOLDER NEW_FOLDER --out FILE

Both services run at once; each turn gives one of them the work while the other waits. It fails if the whole 95 %
interval of the ratio of new to old (geometric mean of the pairs, Student's t) lies above 1.03.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.shared.made_up import made_up_text
from bench.shared.server_program import Server, started_server
from ferryman import Client
from ferryman.types import DataRecipe, OptimizationRecipe, Recipe, RunState, StopRecipe, ValidationRecipe

AT_MOST: Final = 1.03
_STEPS: Final = 100
_SENTENCES: Final = 200
_PAIRS: Final = 4_000
_T_975: Final = {5: 2.776, 10: 2.262, 15: 2.145, 20: 2.093}
"""Student's t for so many pairs."""
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def processor_s(pid: int) -> tuple[float, float]:
    """Return the processor time of a process, and that of its children that have ended, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own, children = (sum(int(ticks) for ticks in fields[first : first + 2]) for first in (11, 13))
    return own / _TICKS_PER_S, children / _TICKS_PER_S


class Side:
    """One checkout's service and what it has used so far."""

    def __init__(self, server: Server, client: Client, sentences: Sequence[str], corpus_id: str) -> None:
        self.times: dict[str, list[float]] = {"training": [], "translating": []}
        self._server, self._client, self._sentences, self._corpus_id = server, client, sentences, corpus_id

    def turn(self) -> None:
        """Train a run, and translate with its model."""
        recipe = Recipe(
            preset="tiny",
            data=DataRecipe(vocabulary_size=2_000),
            optimization=OptimizationRecipe(batch_target_tokens=1_024),
            stop=StopRecipe(max_steps=_STEPS),
            validation=ValidationRecipe(interval_steps=_STEPS, max_translated_pairs=20),
            seed=7,
        )
        _, before_s = processor_s(self._server.pid)
        run = self._client.start_training(self._corpus_id, "speed", recipe)
        ended = self._client.wait(run.run_id)
        assert ended.state is RunState.SUCCEEDED, ended.error
        while (after_s := processor_s(self._server.pid)[1]) == before_s:
            time.sleep(0.05)  # the worker has published and not yet ended
        self.times["training"].append(after_s - before_s)
        model = f"speed/{ended.model_version}"
        self._client.load_model(model)
        before_s, _ = processor_s(self._server.pid)
        for _ in self._client.translate_stream(model, self._sentences, beam_size=1, max_length=30):
            pass
        self.times["translating"].append(processor_s(self._server.pid)[0] - before_s)
        self._client.unload_model(model)


def interval(old: Sequence[float], new: Sequence[float]) -> tuple[float, float, float]:
    """Return the geometric mean of new over old, and its 95 % interval."""
    logs = [math.log(mine / theirs) for theirs, mine in zip(old, new, strict=True)]
    mean = statistics.fmean(logs)
    half = _T_975[len(logs)] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def measure(checkouts: Sequence[Path], turns: int) -> Mapping[str, Mapping[str, object]]:
    """Give each checkout so many turns; return times, ratio and interval of both kinds of work."""
    text = made_up_text(_PAIRS + _SENTENCES)
    pairs = list(zip(text.source[:_PAIRS], text.target[:_PAIRS], strict=True))
    with contextlib.ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        sides = []
        for number, checkout in enumerate(checkouts):
            path = os.pathsep.join(str(checkout.absolute() / part) for part in ("client", "service"))
            command = [sys.executable, "-P", "-m", "ferryman_service", "serve", "--data-dir", str(folder / str(number))]
            command += ["--port", "0", "--probe-port", "0", "--metrics-port", "0", "--device", "cpu"]
            log = folder / f"{number}.log"
            server = running.enter_context(started_server(str(checkout), command, log, {"PYTHONPATH": path}))
            client = running.enter_context(Client(server.address))
            corpus = client.upload_corpus("speed", "en", "de", train=pairs[20:], validation=pairs[:20])
            sides.append(Side(server, client, text.source[_PAIRS:], corpus.corpus_id))
            sides[-1].turn()  # caches fill
            for times in sides[-1].times.values():
                times.clear()
        for turn in range(turns):
            for side in sides if turn % 2 else sides[::-1]:
                side.turn()
    old, new = (side.times for side in sides)
    found = {}
    for kind in old:
        ratio, low, high = interval(old[kind], new[kind])
        found[kind] = {"ratio": round(ratio, 4), "interval": [round(low, 4), round(high, 4)]}
        found[kind] |= {"old_s": old[kind], "new_s": new[kind]}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the ratios; the exit status is 1 if the new checkout is slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs=2, help="the old and the new folder")
    parser.add_argument("--turns", type=int, default=10, choices=sorted(_T_975))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    found = measure(arguments.checkouts, arguments.turns)
    text = json.dumps(found, indent=1)
    print(text)  # noqa: T201
    if arguments.out is not None:
        arguments.out.write_text(f"{text}\n")
    return 1 if any(kind["interval"][0] > AT_MOST for kind in found.values()) else 0  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
