"""The dashboards of Grafana, as code: `make dashboards` writes them beside this file as JSON.

Every expression is run against a real Prometheus and a real service in tests/ops/test_dashboards.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.serving import serving
from deploy.grafana.training import training

FOLDER: Final = Path(__file__).parent


def rendered() -> Mapping[Path, str]:
    """Return the text of each file that is committed."""
    boards = {"training.json": training(), "serving.json": serving()}
    return {FOLDER / name: json.dumps(board, cls=JSONEncoder, indent=1) + "\n" for name, board in boards.items()}


if __name__ == "__main__":
    for path, text in rendered().items():
        path.write_text(text)
