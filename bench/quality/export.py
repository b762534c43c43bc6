"""`make bench-export`: the share of sentences that the exported model translates as its PyTorch weights do.

Translates the test set with the ONNX graphs of a trained model and with its PyTorch weights, greedily and with beam 5,
and counts the sentences whose best hypotheses are the same tokens.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench.shared import test_set
from bench.shared.result import Result
from ferryman_service.application.ports import Translator
from ferryman_service.bundle.manifest import SUBWORDS_FILE, WEIGHTS_FILE, read_manifest
from ferryman_service.domain.training import TrainedModel
from ferryman_service.domain.translation import CancelToken, ComputeType, SearchOptions
from ferryman_service.pipeline.translator import TextTranslator
from ferryman_service.training.export import OnnxExporter
from ferryman_service.translation.loader import OnnxBundleLoader
from ferryman_service.translation.onnx_model import OnnxConfig
from ferryman_service.translation.scheduler import SchedulerConfig

SEARCHES: Final = {"greedy": SearchOptions(beam_size=1), "beam 5": SearchOptions(beam_size=5)}
TARGET_SHARE: Final = 1.0
QUICK_SENTENCES: Final = 100


def load_reference(bundle: Path) -> TextTranslator:
    """Return a translator over the weights that the bundle was exported from."""
    header = read_manifest(bundle).header
    trained = TrainedModel(
        weights=bundle / WEIGHTS_FILE,
        subwords=bundle / SUBWORDS_FILE,
        recipe=header.lineage.recipe,
        scores=header.scores,
        parameters=header.parameters,
        check_sentences=(),
    )
    return OnnxExporter().reference(trained)


def count_equal(one: Translator, other: Translator, sentences: Sequence[str], options: SearchOptions) -> int:
    """Return how many sentences both translate to the same tokens; the others are printed."""
    ours, _ = one.translate(sentences, options, CancelToken())
    theirs, _ = other.translate(sentences, options, CancelToken())
    equal = 0
    for sentence, mine, wanted in zip(sentences, ours, theirs, strict=True):
        if mine.hypotheses[0].tokens == wanted.hypotheses[0].tokens:
            equal += 1
        else:
            difference = abs(mine.hypotheses[0].score - wanted.hypotheses[0].score)
            print(
                f"differs: {sentence}\n  exported: {mine.hypotheses[0].text}\n  PyTorch:  {wanted.hypotheses[0].text}"
            )
            print(f"  scores differ by {difference:.2e}")
    return equal


def measure(bundle: Path, sentences: Sequence[str], quick: bool) -> Result:
    """Run the benchmark."""
    loader, reference = OnnxBundleLoader(OnnxConfig(), SchedulerConfig()), load_reference(bundle)
    with contextlib.closing(loader.load(bundle, ComputeType.FP32)) as exported:
        equal = {name: count_equal(exported, reference, sentences, options) for name, options in SEARCHES.items()}
    for name, count in equal.items():
        print(f"{name}: {count} of {len(sentences)} translations are the same tokens")
    return Result(
        bench="export-equality-quick" if quick else "export-equality",
        value=sum(equal.values()) / (len(equal) * len(sentences)),
        target=TARGET_SHARE,
        peer=None,
        details={"sentences": len(sentences), **{name.replace(" ", "_"): count for name, count in equal.items()}},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if the target is reached."""
    return test_set.run("bench-export", __doc__, measure, quick_sentences=QUICK_SENTENCES, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
