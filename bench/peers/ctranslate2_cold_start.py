"""Loads a CTranslate2 model, translates one sentence and ends, as `serving.cold_start` does with our engine. Runs in an
environment of its own, which `peers.environment` makes.

    python -m bench.peers.ctranslate2_cold_start MODEL SUBWORDS COMPUTE_TYPE TEXT
"""

from __future__ import annotations

import sys
from typing import Final

import ctranslate2  # type: ignore[import-not-found]
import sentencepiece

_END: Final = "</s>"
_BEAM_SIZE: Final = 5


def main() -> None:
    """Print the translation."""
    model, subwords, compute_type, text = sys.argv[1:]
    processor = sentencepiece.SentencePieceProcessor(model_file=subwords)
    translator = ctranslate2.Translator(model, device="cpu", compute_type=compute_type, intra_threads=1)
    source = [*processor.encode(text, out_type=str), _END]
    (result,) = translator.translate_batch([source], beam_size=_BEAM_SIZE)
    print(processor.decode(result.hypotheses[0]), flush=True)


if __name__ == "__main__":
    main()
