"""Published models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ferryman_service.domain.errors import InvalidRequest, Violation
from ferryman_service.domain.ids import is_model_name
from ferryman_service.domain.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """Scores of the published weights on the validation pairs (greedy); `weights` is "best" or "average"."""

    bleu: float
    chrf: float
    nll_per_token: float
    weights: str
    step: int


@dataclass(frozen=True, kw_only=True)
class ModelLineage:
    """Where a model comes from."""

    run_id: str
    corpus_id: str
    corpus_digest: str
    source_language: str
    target_language: str
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """A published version; it never changes. `digest` is the SHA-256 of the bundle's manifest, hexadecimal."""

    name: str
    version: int
    lineage: ModelLineage
    scores: ModelScores
    parameters: int
    size_bytes: int
    digest: str
    create_time_ns: int

    @property
    def reference(self) -> str:
        """The exact reference, "name/version"."""
        return f"{self.name}/{self.version}"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A name with its versions, rising."""

    name: str
    latest_version: ModelVersion
    versions: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class ModelReference:
    """A parsed reference; `version` None is the latest."""

    name: str
    version: int | None = None


def parse_model_reference(text: str, field: str = "model") -> ModelReference:
    """Return the reference written as "name" or "name/version"; raises InvalidRequest naming `field`."""
    name, slash, version = text.partition("/")
    number = int(version) if version.isascii() and version.isdigit() and len(version) < 10 else 0
    if not is_model_name(name) or (slash and number < 1):
        description = f'is {text[:80]!r}, must be "name" or "name/version", such as "en-de" or "en-de/7"'
        raise InvalidRequest([Violation(field=field, description=description, reason="INVALID_MODEL_REFERENCE")])
    return ModelReference(name=name, version=number or None)
