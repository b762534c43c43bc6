"""`make bench-serving-profile`: a profile of translating.

A trained bundle translates the test set in one decoding thread, one sentence at a time and all at once, greedily and
with beam 5. The time inside ONNX Runtime's calls is taken apart from all that is around them: scheduler, search,
buffers, bindings, joining and leaving, and for single sentences the way to the decoding thread and back. The value is
the limit over what is around a step, the worse of one greedy row and 64 sentences of 5 rows. The limit is a multiple of
the plainest step of a search in NumPy, which is measured in the same run (see `serving.search_overhead`).
Beside it, from a run with ONNX Runtime's profiler: the decoder's operators, us a row.
"""

from __future__ import annotations

import collections
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnxruntime

from bench.serving import search_overhead
from bench.shared import test_set
from bench.shared.result import Result
from ferryman_service.bundle.manifest import SUBWORDS_FILE, graph_files, read_manifest
from ferryman_service.domain.translation import CancelToken, ComputeType, PreparedSentence, SearchOptions
from ferryman_service.pipeline.text import SentenceText
from ferryman_service.text.subwords import Subwords
from ferryman_service.translation.engine import BatchingEngine
from ferryman_service.translation.loader import OnnxDecoder
from ferryman_service.translation.onnx_model import OnnxConfig, OnnxModel, session_options
from ferryman_service.translation.scheduler import SchedulerConfig

SENTENCES: Final = 1000
QUICK_SENTENCES: Final = 200
SINGLE_SENTENCES: Final = 100
MAX_ROWS: Final = 320
OUTSIDE_AT_MOST: Final = {"one at a time, greedy": ((1, 1), 2.2), "all at once, beam 5": ((64, 5), 2.7)}
"""(sentences, rows of each) of the plainest step, and how many times as long what is around a step may take."""
_WARM_UP_SENTENCES: Final = 20
_OPERATORS_SHOWN: Final = 12


class TimedSession:
    """An ONNX Runtime session that adds up the time in it."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.seconds, self.calls = 0.0, 0

    def run(self, *arguments: object) -> object:
        """Run, and note how long it took."""
        with self._noted():
            return self._session.run(*arguments)

    def run_with_iobinding(self, binding: onnxruntime.IOBinding) -> None:
        """Run on bound buffers, and note how long it took."""
        with self._noted():
            self._session.run_with_iobinding(binding)

    def io_binding(self) -> onnxruntime.IOBinding:
        """Return a binding of the session."""
        return self._session.io_binding()

    def begin(self) -> None:
        """Forget what was noted."""
        self.seconds, self.calls = 0.0, 0

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        started_s = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started_s
        self.calls += 1


@dataclass(frozen=True)
class Profiled:
    """An engine of one decoding thread, and its two sessions."""

    engine: BatchingEngine
    encoder: TimedSession
    decoder: TimedSession


@contextlib.contextmanager
def profiled_engine(bundle: Path, compute_type: ComputeType) -> Iterator[Profiled]:
    """Load a bundle."""
    header, config = read_manifest(bundle).header, OnnxConfig(compute_type=compute_type)
    model = OnnxModel.load(bundle, header.architecture, config)
    encoder, decoder = TimedSession(model._encoder), TimedSession(model.decoder)
    model._encoder, model.decoder = encoder, decoder
    text = SentenceText(Subwords.load(bundle / SUBWORDS_FILE), header.max_sentence_tokens)
    engine = BatchingEngine(OnnxDecoder(model), text, 0, SchedulerConfig(threads=1, max_rows=MAX_ROWS))
    with contextlib.closing(engine):
        yield Profiled(engine, encoder, decoder)


def measure_turn(
    profiled: Profiled, portions: Sequence[Sequence[PreparedSentence]], beam_size: int
) -> dict[str, float]:
    """Translate the portions one after the other, and return where the time of a step went, us."""
    options = SearchOptions(beam_size=beam_size)
    for portion in portions[:_WARM_UP_SENTENCES]:
        profiled.engine.run(portion, options, CancelToken())
    profiled.encoder.begin()
    profiled.decoder.begin()
    started_s = time.perf_counter()
    results = [result for portion in portions for result in profiled.engine.run(portion, options, CancelToken())]
    total_s = time.perf_counter() - started_s
    steps, inside_s = profiled.decoder.calls, profiled.encoder.seconds + profiled.decoder.seconds
    row_steps = sum(result.timings.steps for result in results) * beam_size
    return {
        "sentences": len(results),
        "steps": steps,
        "rows_a_step": round(row_steps / steps, 1),
        "decoder_us": round(1e6 * profiled.decoder.seconds / steps, 1),
        "outside_us": round(1e6 * (total_s - inside_s) / steps, 1),
        "encoder_us_a_sentence": round(1e6 * profiled.encoder.seconds / len(results), 1),
        "us_a_row": round(1e6 * total_s / row_steps, 2),
        "ms_a_sentence": round(1e3 * total_s / len(results), 3),
    }


def operators(bundle: Path, compute_type: ComputeType, sentences: Sequence[str], beam_size: int) -> dict[str, float]:
    """Return the time of the decoder's operators, us a row, as ONNX Runtime's profiler has it."""
    with tempfile.TemporaryDirectory() as folder, profiled_engine(bundle, compute_type) as profiled:
        options = session_options(OnnxConfig(compute_type=compute_type))
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        path = str(bundle / graph_files(compute_type).decoder)
        profiled.decoder._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        search = SearchOptions(beam_size=beam_size)
        prepared = profiled.engine.prepare_all(sentences, (), search)
        results = profiled.engine.run(prepared, search, CancelToken())
        events = json.loads(Path(profiled.decoder._session.end_profiling()).read_text())
    rows, spent_us = sum(result.timings.steps for result in results) * beam_size, collections.Counter[str]()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            spent_us[event["args"]["op_name"]] += event["dur"]
    return {name: round(us / rows, 2) for name, us in spent_us.most_common(_OPERATORS_SHOWN)}


def measure(bundle: Path, sentences: Sequence[str], quick: bool) -> Result:
    """Run the benchmark."""
    details: dict[str, Any] = {}
    for compute_type in (ComputeType.FP32, ComputeType.INT8):
        found: dict[str, Any] = {}
        with profiled_engine(bundle, compute_type) as profiled:
            prepared = profiled.engine.prepare_all(sentences, (), SearchOptions())
            for name, beam_size in (("greedy", 1), ("beam 5", 5)):
                single = [[sentence] for sentence in prepared[:SINGLE_SENTENCES]]
                found[f"one at a time, {name}"] = measure_turn(profiled, single, beam_size)
                found[f"all at once, {name}"] = measure_turn(profiled, [prepared], beam_size)
        for name, beam_size in (("greedy", 1), ("beam 5", 5)):
            found[f"operators, {name}"] = operators(bundle, compute_type, sentences[:QUICK_SENTENCES], beam_size)
        details[compute_type.value] = found
        print(f"\n{compute_type}")
        for name, row in found.items():
            print(f"  {name:24}" + "  ".join(f"{key} {value:g}" for key, value in row.items()))
    exact = details[ComputeType.FP32.value]
    plain_us = {name: search_overhead.measure(*shape)["plain_us"] for name, (shape, _) in OUTSIDE_AT_MOST.items()}
    ratios = {name: exact[name]["outside_us"] / plain_us[name] for name in OUTSIDE_AT_MOST}
    most = {name: ratio for name, (_, ratio) in OUTSIDE_AT_MOST.items()}
    return Result(
        bench="serving-profile-quick" if quick else "serving-profile",
        value=min(most[name] / ratio for name, ratio in ratios.items()),
        target=1.0,
        peer=None,
        details={
            **details,
            "unit": "outside_at_most over outside_ratio",
            "plain_us": plain_us,
            "outside_ratio": {name: round(ratio, 3) for name, ratio in ratios.items()},
            "outside_at_most": most,
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if the target is reached."""
    return test_set.run(
        "bench-serving-profile", __doc__, measure, quick_sentences=QUICK_SENTENCES, sentences=SENTENCES, argv=argv
    )


if __name__ == "__main__":
    sys.exit(main())
