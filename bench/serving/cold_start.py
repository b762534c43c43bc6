"""Loads a bundle, translates one sentence and ends: what a fresh process needs until its first translation. Imports
what serving imports and nothing else, and fails if torch is among it.

    python -m bench.serving.cold_start BUNDLE COMPUTE_TYPE TEXT
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.serving.engine import open_engine
from ferryman_service.domain.translation import CancelToken, ComputeType, SearchOptions


def main() -> None:
    """Print the translation."""
    bundle, compute_type, text = sys.argv[1:]
    engine = open_engine(Path(bundle), ComputeType(compute_type), threads=1)
    translations, _ = engine.translate([text], SearchOptions(beam_size=5), CancelToken())
    print(translations[0].hypotheses[0].text, flush=True)
    assert "torch" not in sys.modules, "serving must not import torch"


if __name__ == "__main__":
    main()
