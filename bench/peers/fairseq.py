"""fairseq's own training program, measured by turns, in the environment that `peers.environment` makes.

Its command line is fairseq-train's. Only the moment between two updates is caught; the loop, the data loader, the
optimizer and the logging are fairseq's.
"""

from __future__ import annotations

from typing import Any

from fairseq.trainer import Trainer  # type: ignore[import-not-found]
from fairseq_cli.train import cli_main  # type: ignore[import-not-found]

from bench.shared.turns import Turns, TurnsOver


def main() -> None:
    """Train until no turn follows."""
    turns = Turns()
    train_step = Trainer.train_step
    tokens = 0

    def measured_step(trainer: Any, samples: Any, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        nonlocal tokens
        turns.boundary(tokens)
        tokens = sum(int(sample["ntokens"]) for sample in samples)
        return train_step(trainer, samples, *arguments, **options)

    Trainer.train_step = measured_step
    try:
        cli_main()
    except TurnsOver:
        return


if __name__ == "__main__":
    main()
