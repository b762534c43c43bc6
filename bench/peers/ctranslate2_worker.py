"""CTranslate2 as a process that answers commands; see `shared.commands`. Runs in an environment of its own, which
`peers.environment` makes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ctranslate2  # type: ignore[import-not-found]

from bench.shared.commands import Commands, Found, TokenSearch
from bench.shared.process import answer_commands


class CTranslate2Engine:
    """A TokenEngine over a converted model. CTranslate2 takes subwords as text: looking up ids is not timed."""

    def __init__(self, folder: Path, translator: Any) -> None:  # noqa: ANN401
        self._pieces: list[str] = json.loads((folder / "shared_vocabulary.json").read_text())
        self._tokens = {piece: token for token, piece in enumerate(self._pieces)}
        self._translator = translator

    def prepare(self, sentence: Sequence[int]) -> list[str]:
        """Return the sentence's subwords."""
        return [self._pieces[token] for token in sentence]

    def translate(self, prepared: Sequence[list[str]], search: TokenSearch) -> Any:  # noqa: ANN401
        """Translate; batches of `max_batch_size` are of similar length, which CTranslate2 sees to."""
        return self._translator.translate_batch(
            list(prepared),
            beam_size=search.beam_size,
            length_penalty=1,
            max_batch_size=search.max_batch_size,
            max_decoding_length=search.max_length,
            min_decoding_length=search.max_length if search.forced else 1,
            return_scores=True,
        )

    def read(self, result: Any) -> list[Found]:  # noqa: ANN401
        """Return the best translations."""
        return [
            Found(tokens=[self._tokens[piece] for piece in item.hypotheses[0]], score=item.scores[0]) for item in result
        ]


def main() -> None:
    """Load, and answer until no command follows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a folder that ctranslate2_convert has written")
    parser.add_argument("--compute-type", required=True, help="float32 or int8")
    parser.add_argument("--inter-threads", type=int, default=1, help="sentence batches at a time")
    parser.add_argument("--intra-threads", type=int, default=1, help="threads for each of them")
    arguments = parser.parse_args()
    translator = ctranslate2.Translator(
        str(arguments.model),
        device="cpu",
        compute_type=arguments.compute_type,
        inter_threads=arguments.inter_threads,
        intra_threads=arguments.intra_threads,
    )
    engine = CTranslate2Engine(arguments.model, translator)
    answer_commands(Commands(engine).handlers(), version=ctranslate2.__version__, compute_type=translator.compute_type)


if __name__ == "__main__":
    main()
