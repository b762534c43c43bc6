"""Published models."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ferryman_service.domain.errors import InvalidRequest, Violation
from ferryman_service.domain.ids import ID_PATTERN, MODEL_NAME_PATTERN, is_alias, is_model_name
from ferryman_service.domain.recipe import Recipe
from ferryman_service.domain.schema import Limits, Number, Text
from ferryman_service.domain.stored import UnreadableRow
from ferryman_service.domain.translation import ComputeType


class PublishedWeights(enum.StrEnum):
    """The weights that a run publishes: those of one checkpoint, or the average of several."""

    CHECKPOINT = "checkpoint"
    AVERAGE = "average"


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """Scores of the published weights on the validation pairs (greedy). BLEU and chrF are those of `translated_pairs`,
    the loss is that of `loss_pairs`; 0 if not known. `bleu_signature` is sacreBLEU's, empty if not known."""

    bleu: float
    chrf: float
    nll_per_token: float
    weights: PublishedWeights
    step: int
    translated_pairs: int = 0
    loss_pairs: int = 0
    bleu_signature: str = ""


@dataclass(frozen=True, kw_only=True)
class Int8Scores:
    """What 8-bit arithmetic costs: sacreBLEU of the same held-out pairs, greedy, in float32 and in int8. Without pairs
    nothing was measured, and there are no scores."""

    pairs: int
    fp32_bleu: float | None = None
    int8_bleu: float | None = None

    def __post_init__(self) -> None:
        measured = self.pairs > 0
        assert measured == (self.fp32_bleu is not None) == (self.int8_bleu is not None), "scores are of pairs"

    @property
    def loss(self) -> float | None:
        """BLEU lost; negative if int8 is better, None if nothing was measured."""
        return None if self.fp32_bleu is None or self.int8_bleu is None else self.fp32_bleu - self.int8_bleu


@dataclass(frozen=True, kw_only=True)
class Int8Outcome:
    """What a version's int8 was measured to cost, and whether it was kept: can the version be served so?"""

    scores: Int8Scores
    kept: bool


@dataclass(frozen=True, kw_only=True)
class ModelLineage:
    """Where a model comes from. `initial_model` is the version, "name/7", whose weights training started from; empty
    if it started from random ones."""

    run_id: str
    corpus_id: str
    corpus_digest: str
    source_language: str
    target_language: str
    recipe: Recipe
    initial_model: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """A published version; it never changes. `digest` is the SHA-256 of the bundle's manifest, hexadecimal. `int8`
    None: nobody has said what it costs, as of versions of an earlier release."""

    name: str
    version: int
    lineage: ModelLineage
    scores: ModelScores
    parameters: int
    size_bytes: int
    digest: str
    create_time_ns: int
    int8: Int8Outcome | None = None

    @property
    def reference(self) -> str:
        """The exact reference, "name/version"."""
        return f"{self.name}/{self.version}"


_SCORE: Final = Number(0, 100.01)
"""Rounding may bring a score a little over 100."""
VERSION_LIMITS: Final[Limits] = {
    (ModelScores, "bleu"): _SCORE,
    (ModelScores, "chrf"): _SCORE,
    (ModelScores, "translated_pairs"): Number(0, 10**9),
    (ModelScores, "loss_pairs"): Number(0, 10**12),
    (Int8Scores, "pairs"): Number(0, 10**9),
    (Int8Scores, "fp32_bleu"): _SCORE,
    (Int8Scores, "int8_bleu"): _SCORE,
    (ModelLineage, "run_id"): Text(26, f"run_{ID_PATTERN}", "the id of a run"),
    (ModelLineage, "corpus_id"): Text(26, f"cor_{ID_PATTERN}", "the id of a corpus"),
    (ModelLineage, "corpus_digest"): Text(64, "[0-9a-f]{64}", "64 hexadecimal digits"),
    (ModelLineage, "initial_model"): Text(
        80, f"(?:{MODEL_NAME_PATTERN}/[1-9][0-9]{{0,8}})?", 'empty or "name/version"'
    ),
    (ModelLineage, "source_language"): Text(100),
    (ModelLineage, "target_language"): Text(100),
}
"""What a version says about itself, wherever it comes from: what is beyond could not be told to a caller."""


@dataclass(frozen=True, kw_only=True)
class ModelAlias:
    """A name for one version of a model, which can be moved to another. `update_time_ns`: when it was last set."""

    alias: str
    version: int
    update_time_ns: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """A name with its versions, rising, and its aliases, by name. `unreadable` says of each version and alias that
    cannot be read why."""

    name: str
    latest_version: ModelVersion | UnreadableRow
    versions: Sequence[int]
    aliases: Sequence[ModelAlias] = ()
    unreadable: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class BundleFile:
    """A file of a published version; `sha256` is hexadecimal."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A version that is in memory; `load_time_ns` counts from the first byte read to the end of the warm-up.
    `compute_type` is what it is computed in, which may not be what was asked for."""

    reference: str
    memory_bytes: int
    load_time_ns: int
    compute_type: ComputeType


@dataclass(frozen=True, kw_only=True)
class ModelReference:
    """A parsed reference: to a version, to what an alias points at, or, without both, to the latest version."""

    name: str
    version: int | None = None
    alias: str | None = None

    def __post_init__(self) -> None:
        assert self.version is None or self.alias is None, "a version and an alias exclude each other"

    def __str__(self) -> str:
        """The reference as it is written."""
        if self.version is not None:
            return f"{self.name}/{self.version}"
        return self.name if self.alias is None else f"{self.name}@{self.alias}"


def parse_model_reference(text: str, field: str = "model") -> ModelReference:
    """Return the reference written as "name", "name/version" or "name@alias"; raises InvalidRequest naming `field`."""
    name, mark, rest = _split(text)
    number = int(rest) if rest.isascii() and rest.isdigit() and len(rest) < 10 else 0
    legal = {"": True, "/": number >= 1, "@": is_alias(rest)}
    if not (is_model_name(name) and legal[mark]):
        description = (
            f'is {text[:80]!r}, must be "name", "name/version" or "name@alias", such as "en-de", "en-de/7" or '
            '"en-de@production"'
        )
        raise InvalidRequest([Violation(field=field, description=description, reason="INVALID_MODEL_REFERENCE")])
    return ModelReference(name=name, version=number if mark == "/" else None, alias=rest if mark == "@" else None)


def parse_exact_reference(text: str, field: str = "model") -> ModelReference:
    """Return the reference written as "name/version", the only form accepted; raises InvalidRequest naming `field`."""
    reference = parse_model_reference(text, field)
    if reference.version is None:
        description = f'is {text[:80]!r}, must name a version, such as "{reference.name}/7"'
        raise InvalidRequest([Violation(field=field, description=description, reason="INVALID_MODEL_REFERENCE")])
    return reference


def _split(text: str) -> tuple[str, str, str]:
    """Return the text before the first "/" or "@", that mark, and the text after it."""
    name, slash, rest = text.partition("/")
    return (name, slash, rest) if slash else text.partition("@")
