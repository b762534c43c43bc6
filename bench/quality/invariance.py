"""`make bench-invariance`: the share of sentences whose translation does not depend on the rest of the batch.

Every test sentence is translated alone, then all of them together: several callers, which begin at random moments and
send random portions, greedily and with beam 5 at the same time, over two decoding threads. The value is the share that
got the same tokens both times; scores must be the same to 1e-5 too.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.shared import test_set
from bench.shared.result import Result
from ferryman_service.domain.translation import CancelToken, ComputeType, Hypothesis, SearchOptions
from ferryman_service.translation.engine import BatchingEngine
from ferryman_service.translation.loader import OnnxBundleLoader
from ferryman_service.translation.onnx_model import OnnxConfig
from ferryman_service.translation.scheduler import SchedulerConfig

SEARCHES: Final = {"greedy": SearchOptions(beam_size=1), "beam 5": SearchOptions(beam_size=5)}
COMPUTE_TYPES: Final = (ComputeType.FP32, ComputeType.INT8)
CALLERS: Final = 4
QUICK_SENTENCES: Final = 200
_SEED: Final = 7
_LARGEST_PORTION: Final = 40
_LONGEST_PAUSE_S: Final = 0.05
_SCORE_TOLERANCE: Final = 1e-5

Found = dict[tuple[str, int], Hypothesis]
"""The best hypothesis of each search and sentence number."""


def translate_alone(engine: BatchingEngine, sentences: Sequence[str]) -> Found:
    """Translate one sentence after the other."""
    return {
        (name, number): engine.translate([sentence], options, CancelToken())[0][0].hypotheses[0]
        for name, options in SEARCHES.items()
        for number, sentence in enumerate(sentences)
    }


def translate_together(engine: BatchingEngine, sentences: Sequence[str]) -> Found:
    """Translate all sentences with both searches, in random portions from several callers at random moments."""
    generator = random.Random(_SEED)
    work = [(name, number) for name in SEARCHES for number in range(len(sentences))]
    generator.shuffle(work)
    found: Found = {}

    def call(mine: Sequence[tuple[str, int]], seed: int) -> None:
        own = random.Random(seed)
        rest = list(mine)
        while rest:
            name, size = rest[0][0], own.randint(1, _LARGEST_PORTION)
            portion = [item for item in rest if item[0] == name][:size]
            rest = [item for item in rest if item not in set(portion)]
            time.sleep(own.uniform(0, _LONGEST_PAUSE_S))
            texts = [sentences[number] for _, number in portion]
            translations, _ = engine.translate(texts, SEARCHES[name], CancelToken())
            found.update(zip(portion, (each.hypotheses[0] for each in translations), strict=True))

    callers = [threading.Thread(target=call, args=(work[caller::CALLERS], caller)) for caller in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return found


def count_same(alone: Found, together: Found) -> Mapping[str, int]:
    """Return by search how many translations are the same."""
    same = dict.fromkeys(SEARCHES, 0)
    for (name, number), wanted in alone.items():
        mine = together[name, number]
        same[name] += mine.tokens == wanted.tokens and abs(mine.score - wanted.score) < _SCORE_TOLERANCE
    return same


def measure(bundle: Path, sentences: Sequence[str], quick: bool) -> Result:
    """Run the benchmark."""
    loader = OnnxBundleLoader(OnnxConfig(), SchedulerConfig(threads=2))
    details: dict[str, int] = {}
    for compute_type in COMPUTE_TYPES:
        with contextlib.closing(loader.load(bundle, compute_type)) as engine:
            same = count_same(translate_alone(engine, sentences), translate_together(engine, sentences))
        for name, count in same.items():
            print(f"{compute_type} {name}: {count} of {len(sentences)} the same alone and together")
            details[f"{compute_type}_{name.replace(' ', '_')}"] = count
    return Result(
        bench="invariance-quick" if quick else "invariance",
        value=sum(details.values()) / (len(details) * len(sentences)),
        target=1.0,
        peer=None,
        details={"sentences": len(sentences), "callers": CALLERS, **details},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if the target is reached."""
    return test_set.run("bench-invariance", __doc__, measure, quick_sentences=QUICK_SENTENCES, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
