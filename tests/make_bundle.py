"""Writes the bundle of a small model with random weights into an empty folder: `python -m tests.make_bundle FOLDER`."""

import sys
import tempfile
from pathlib import Path

from ferryman_service.training.export import OnnxExporter
from tests.fakes.random_model import random_trained_model, small_recipe, some_lineage


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as parts:
        trained = random_trained_model(Path(parts), small_recipe())
        OnnxExporter().export(trained, some_lineage(trained.recipe), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
