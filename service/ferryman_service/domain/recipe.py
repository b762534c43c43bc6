"""Recipes: what is trained and how. Presets, overrides, and every rule a recipe must keep."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from ferryman_service.domain.errors import InvalidRecipe, Violation
from ferryman_service.domain.schedule import DecayShape, LearningRateSchedule, ScheduleKind, decay_steps


class Preset(enum.StrEnum):
    """Named starting points."""

    TINY = "tiny"
    SMALL = "small"
    BASE = "base"
    BIG = "big"
    DEEP_SHALLOW = "deep_shallow"


class NormPlacement(enum.StrEnum):
    """POST: LayerNorm(x + Sublayer(x)), the paper's form. PRE: x + Sublayer(LayerNorm(x)). DEEP: LayerNorm(alpha x +
    Sublayer(x)) with initial weights scaled by beta, which keeps tens of layers stable (Wang et al., 2022)."""

    POST = "post"
    PRE = "pre"
    DEEP = "deep"


class Activation(enum.StrEnum):
    """What stands between the two maps of a feed-forward sublayer. SWIGLU gates (Shazeer, 2020): a third map."""

    RELU = "relu"
    GELU = "gelu"
    SWIGLU = "swiglu"


class Positions(enum.StrEnum):
    """SINUSOIDAL: added to the embeddings. ROPE: queries and keys of self-attention are rotated (Su et al., 2021)."""

    SINUSOIDAL = "sinusoidal"
    ROPE = "rope"


class Precision(enum.StrEnum):
    """What matrix products are computed in. Weights and moments are FP32 in each."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Averaging(enum.StrEnum):
    """Which checkpoints are averaged at the end: the last ones, the best ones, none."""

    LAST = "last"
    BEST = "best"
    NONE = "none"


class SubwordAlgorithm(enum.StrEnum):
    """How SentencePiece learns subwords."""

    UNIGRAM = "unigram"
    BPE = "bpe"


class SelectionMetric(enum.StrEnum):
    """The validation score that decides which weights are the best."""

    LOSS = "loss"
    BLEU = "bleu"
    CHRF = "chrf"


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The network. The vocabulary size is in DataRecipe."""

    d_model: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    ffn_dim: int
    dropout: float
    attention_dropout: float
    activation_dropout: float
    norm: NormPlacement
    activation: Activation = Activation.RELU
    positions: Positions = Positions.SINUSOIDAL


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Subwords, and which training pairs are used.

    `subword_regularization_alpha` (unigram) and `bpe_dropout` (BPE) segment the training pairs anew in each epoch; 0 is
    off.
    `split_digits`: every digit is a subword of its own. `reduce_vocabulary`: a corpus that yields fewer subwords than
    `vocabulary_size` gets all of them; otherwise it cannot be trained on.
    """

    vocabulary_size: int
    subword_algorithm: SubwordAlgorithm
    character_coverage: float
    max_sentence_tokens: int
    max_length_ratio: float
    subword_regularization_alpha: float = 0.0
    bpe_dropout: float = 0.0
    split_digits: bool = False
    reduce_vocabulary: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimizationRecipe:
    """Adam, decoupled weight decay, clipping (0: off), label smoothing (epsilon / K over all K subwords), target tokens
    per update and the micro-batches that they come in, R-Drop (0: off), moving average of the weights (0: off).

    Up to `max_skipped_updates` non-finite updates in a row are skipped; one more is a divergence, which rolls back to
    the last checkpoint, `max_rollbacks` times, each time multiplying the learning rate by `rollback_rate_scale`.
    """

    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    clip_norm: float
    label_smoothing: float
    batch_target_tokens: int
    accumulation_steps: int = 1
    weight_decay: float = 0.0
    r_drop_alpha: float = 0.0
    ema_decay: float = 0.0
    precision: Precision = Precision.FP32
    max_skipped_updates: int = 10
    max_rollbacks: int = 2
    rollback_rate_scale: float = 0.5


@dataclass(frozen=True, kw_only=True)
class StopRecipe:
    """When training ends, or with WSD begins to decay (`patience`, `target_score`); 0 is no limit.

    `target_score` is one of the validation's metric: a BLEU or chrF to reach at least, a loss at most.
    """

    max_steps: int
    max_epochs: int
    max_duration_s: float
    patience: int
    target_score: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ValidationRecipe:
    """Validation, checkpoints and the choice of the published weights.

    A checkpoint follows each validation, and also every `checkpoint_interval_steps` unless that is 0.
    """

    interval_steps: int
    max_translated_pairs: int
    metric: SelectionMetric
    keep_last: int
    averaging: Averaging = Averaging.LAST
    checkpoint_interval_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A resolved recipe: every value is set and every rule kept."""

    preset: Preset
    model: ModelRecipe
    data: DataRecipe
    schedule: LearningRateSchedule
    optimization: OptimizationRecipe
    stop: StopRecipe
    validation: ValidationRecipe
    seed: int


_Part = TypeVar("_Part")
_ENUMS: Final[Mapping[str, type[enum.StrEnum]]] = {
    "norm": NormPlacement,
    "activation": Activation,
    "positions": Positions,
    "subword_algorithm": SubwordAlgorithm,
    "precision": Precision,
    "metric": SelectionMetric,
    "averaging": Averaging,
    "decay_shape": DecayShape,
}

Overrides = Mapping[str, Any]
"""Set fields of a recipe, nested as in the proto: {"preset": Preset.TINY, "model": {"d_model": 64}, "seed": 7}."""

_TINY: Final[dict[str, Any]] = {
    "model": {
        "d_model": 128,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "heads": 4,
        "ffn_dim": 256,
        "dropout": 0.15,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "norm": NormPlacement.POST,
        "activation": Activation.RELU,
        "positions": Positions.SINUSOIDAL,
    },
    "data": {
        "vocabulary_size": 8000,
        "subword_algorithm": SubwordAlgorithm.UNIGRAM,
        "character_coverage": 1.0,
        "max_sentence_tokens": 256,
        "max_length_ratio": 9.0,
        "subword_regularization_alpha": 0.0,
        "bpe_dropout": 0.0,
        "split_digits": False,
    },
    "schedule": {"kind": ScheduleKind.NOAM, "warmup_steps": 800},
    "optimization": {
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-9,
        "clip_norm": 1.0,
        "label_smoothing": 0.1,
        "batch_target_tokens": 1024,
        "accumulation_steps": 1,
        "weight_decay": 0.0,
        "r_drop_alpha": 0.0,
        "ema_decay": 0.0,
        "precision": Precision.FP32,
        "max_skipped_updates": 10,
        "max_rollbacks": 2,
        "rollback_rate_scale": 0.5,
    },
    "stop": {"max_steps": 10_000, "max_epochs": 0, "max_duration_s": 0.0, "patience": 0, "target_score": 0.0},
    "validation": {
        "interval_steps": 500,
        "max_translated_pairs": 500,
        "metric": SelectionMetric.BLEU,
        "keep_last": 5,
        "averaging": Averaging.LAST,
        "checkpoint_interval_steps": 0,
    },
    "seed": 1,
}
_SMALL_CHANGES: Final[dict[str, Any]] = {
    "model": {"d_model": 256, "encoder_layers": 6, "decoder_layers": 6, "ffn_dim": 1024, "dropout": 0.2},
    "data": {"vocabulary_size": 16_000},
    "schedule": {"warmup_steps": 2000},
    "optimization": {"batch_target_tokens": 4096},
    "stop": {"max_steps": 30_000},
    "validation": {"interval_steps": 1000, "max_translated_pairs": 1000},
}
_BASE_CHANGES: Final[dict[str, Any]] = {
    "model": {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "heads": 8, "ffn_dim": 2048, "dropout": 0.1},
    "data": {"vocabulary_size": 32_000},
    "schedule": {"warmup_steps": 4000},
    "optimization": {"clip_norm": 0.0, "batch_target_tokens": 25_000},
    "stop": {"max_steps": 100_000},
    "validation": {"interval_steps": 2000, "max_translated_pairs": 3000},
}
_BIG_CHANGES: Final[dict[str, Any]] = {
    "model": {"d_model": 1024, "ffn_dim": 4096, "heads": 16, "dropout": 0.3},
    "stop": {"max_steps": 300_000},
}
_DEEP_SHALLOW_CHANGES: Final[dict[str, Any]] = {
    "model": {"encoder_layers": 12, "decoder_layers": 2, "norm": NormPlacement.PRE},
}


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _merge(merged.get(key) or {}, value) if isinstance(value, Mapping) else value
    return merged


PRESETS: Final[Mapping[Preset, Mapping[str, Any]]] = {
    Preset.TINY: _TINY,
    Preset.SMALL: _merge(_TINY, _SMALL_CHANGES),
    Preset.BASE: _merge(_TINY, _BASE_CHANGES),
    Preset.BIG: _merge(_merge(_TINY, _BASE_CHANGES), _BIG_CHANGES),
    Preset.DEEP_SHALLOW: _merge(_merge(_TINY, _BASE_CHANGES), _DEEP_SHALLOW_CHANGES),
}


@dataclass(frozen=True)
class _Range:
    """A legal range; an open bound is excluded."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below  # False for NaN

    def __str__(self) -> str:
        low, high = ("above" if self.open_low else "from"), ("to below" if self.open_high else "to")
        return f"{low} {self.low:g} {high} {self.high:g}"


_DROPOUT: Final = _Range(0, 1, open_high=True)
_STEPS: Final = _Range(1, 1e9)
_RANGES: Final[Mapping[str, _Range]] = {
    "model.d_model": _Range(8, 8192),
    "model.encoder_layers": _Range(1, 64),
    "model.decoder_layers": _Range(1, 64),
    "model.heads": _Range(1, 128),
    "model.ffn_dim": _Range(8, 65_536),
    "model.dropout": _DROPOUT,
    "model.attention_dropout": _DROPOUT,
    "model.activation_dropout": _DROPOUT,
    # Four special symbols, the mark of a word's beginning and one character.
    "data.vocabulary_size": _Range(6, 256_000),
    "data.character_coverage": _Range(0.9, 1),
    "data.max_sentence_tokens": _Range(4, 4096),
    "data.max_length_ratio": _Range(1, 1000),
    "data.subword_regularization_alpha": _Range(0, 1),
    "data.bpe_dropout": _Range(0, 1, open_high=True),
    "optimization.adam_beta1": _Range(0, 1, open_high=True),
    "optimization.adam_beta2": _Range(0, 1, open_high=True),
    "optimization.adam_epsilon": _Range(0, 1, open_low=True),
    "optimization.clip_norm": _Range(0, 1e9),
    "optimization.label_smoothing": _Range(0, 1, open_high=True),
    "optimization.batch_target_tokens": _Range(64, 1e7),
    "optimization.accumulation_steps": _Range(1, 1024),
    "optimization.weight_decay": _Range(0, 1),
    "optimization.r_drop_alpha": _Range(0, 100),
    "optimization.ema_decay": _Range(0, 1, open_high=True),
    "optimization.max_skipped_updates": _Range(0, 1000),
    "optimization.max_rollbacks": _Range(0, 100),
    "optimization.rollback_rate_scale": _Range(0, 1, open_low=True),
    "stop.max_steps": _Range(0, 1e9),
    "stop.max_epochs": _Range(0, 1e6),
    "stop.max_duration_s": _Range(0, 1e9),
    "stop.patience": _Range(0, 1e6),
    "stop.target_score": _Range(0, 1000),
    "validation.interval_steps": _STEPS,
    "validation.max_translated_pairs": _Range(1, 1e6),
    "validation.keep_last": _Range(1, 100),
    "validation.checkpoint_interval_steps": _Range(0, 1e9),
    "seed": _Range(0, 2**63 - 1),
}
_SCHEDULE_RANGES: Final[Mapping[str, _Range]] = {
    "warmup_steps": _STEPS,
    "factor": _Range(0, 1000, open_low=True),
    "d_model": _Range(1, 65_536),
    "peak_learning_rate": _Range(0, 10, open_low=True),
    "minimum_learning_rate": _Range(0, 10),
    "total_steps": _STEPS,
    "decay_share": _Range(0, 1, open_low=True, open_high=True),
}
_SCHEDULE_FIELDS: Final[Mapping[ScheduleKind, tuple[str, ...]]] = {
    ScheduleKind.NOAM: ("factor", "d_model"),
    ScheduleKind.INVERSE_SQRT: ("peak_learning_rate",),
    ScheduleKind.COSINE: ("peak_learning_rate", "minimum_learning_rate", "total_steps"),
    ScheduleKind.LINEAR: ("peak_learning_rate", "minimum_learning_rate", "total_steps"),
    ScheduleKind.CONSTANT: ("peak_learning_rate",),
    ScheduleKind.WSD: (
        "peak_learning_rate",
        "minimum_learning_rate",
        "total_steps",
        "decay_share",
        "decay_shape",
    ),
}
_DECAY_SHARE: Final = 0.3
_NOAM_FIELDS: Final = frozenset({"factor", "d_model"})


def resolve_recipe(overrides: Overrides, path: str = "recipe") -> Recipe:
    """Return the preset with the overrides applied.

    Raises InvalidRecipe with every violation; `path` is the prefix of their field names.
    """
    preset = overrides.get("preset", Preset.TINY)
    values = _merged(overrides)
    is_default = "vocabulary_size" not in overrides.get("data", {})
    values["data"] = {"reduce_vocabulary": is_default, **values["data"]}
    if "max_steps" not in overrides.get("stop", {}) and _has_other_limit(overrides.get("stop", {})):
        values["stop"]["max_steps"] = 0
    if _is_limited_by_time_alone(values["stop"]) and _NOAM_FIELDS.isdisjoint(wanted := overrides.get("schedule", {})):
        # NOAM never comes down: of a run whose number of steps nobody knows, the decay is planned while it trains.
        values["schedule"] = {**values["schedule"], "kind": wanted.get("kind", ScheduleKind.WSD)}
    violations = [*_out_of_range(values, path), *_conflicts(values, path)]
    schedule, schedule_violations = _resolve_schedule(
        values["schedule"],
        f"{path}.schedule",
        _ScheduleDefaults(
            d_model=values["model"]["d_model"],
            warmup_steps=800,
            total_steps=values["stop"]["max_steps"],
            max_duration_s=values["stop"]["max_duration_s"],
            in_recipe=True,
        ),
    )
    violations += schedule_violations
    if (wanted := values["schedule"].get("d_model")) is not None and wanted != values["model"]["d_model"]:
        text = f"is {wanted}, but model.d_model is {values['model']['d_model']}: leave it out, or make them equal"
        violations.append(Violation(field=f"{path}.schedule.d_model", description=text, reason="CONFLICT"))
    if violations:
        raise InvalidRecipe(violations)
    assert schedule is not None
    return Recipe(
        preset=preset,
        model=ModelRecipe(**values["model"]),
        data=DataRecipe(**values["data"]),
        schedule=schedule,
        optimization=OptimizationRecipe(**values["optimization"]),
        stop=StopRecipe(**values["stop"]),
        validation=ValidationRecipe(**values["validation"]),
        seed=values["seed"],
    )


@dataclass(frozen=True, kw_only=True)
class RecipeParts:
    """The parts of a recipe that say how much it takes; None: that part has values that are out of range."""

    model: ModelRecipe | None
    vocabulary_size: int | None
    optimization: OptimizationRecipe | None
    max_duration_s: float | None


def recipe_parts(overrides: Overrides) -> RecipeParts:
    """Return the parts that the preset with the overrides has, also of a recipe that breaks rules elsewhere."""
    values = _merged(overrides)
    bad = [violation.field for violation in _out_of_range(values, "recipe")]

    def is_legal(part: str) -> bool:
        return not any(field.startswith(f"recipe.{part}") for field in bad)

    return RecipeParts(
        model=ModelRecipe(**values["model"]) if is_legal("model.") else None,
        vocabulary_size=values["data"]["vocabulary_size"] if is_legal("data.vocabulary_size") else None,
        optimization=OptimizationRecipe(**values["optimization"]) if is_legal("optimization.") else None,
        max_duration_s=values["stop"]["max_duration_s"] if is_legal("stop.max_duration") else None,
    )


def _merged(overrides: Overrides) -> dict[str, Any]:
    return _merge(PRESETS[overrides.get("preset", Preset.TINY)], overrides)


def resolve_schedule(overrides: Overrides, path: str = "schedule") -> LearningRateSchedule:
    """Return a schedule that stands by itself (GetLRSchedule); raises InvalidRecipe with every violation."""
    schedule, violations = _resolve_schedule(overrides, path, _ScheduleDefaults(d_model=512, warmup_steps=4000))
    if violations:
        raise InvalidRecipe(violations)
    assert schedule is not None
    return schedule


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as JSON types."""
    return dataclasses.asdict(recipe)


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe that `recipe_to_dict` wrote; its rules are not checked again."""
    return Recipe(
        preset=Preset(values["preset"]),
        model=_part(ModelRecipe, values["model"]),
        data=_part(DataRecipe, values["data"]),
        schedule=_schedule_from_dict(values["schedule"]),
        optimization=_part(OptimizationRecipe, values["optimization"]),
        stop=_part(StopRecipe, values["stop"]),
        validation=_part(ValidationRecipe, values["validation"]),
        seed=values["seed"],
    )


def out_of_range(recipe: Recipe, path: str) -> Iterator[Violation]:
    """Yield what of a stored recipe is out of range, by its stored names; `path` is their prefix."""
    values = recipe_to_dict(recipe)
    yield from _out_of_range(values, path, stored=True)
    for name, legal in _SCHEDULE_RANGES.items():
        value = values["schedule"][name]
        if value is not None and value not in legal:
            description = f"is {value:g}, must be {legal}"
            yield Violation(field=f"{path}.schedule.{name}", description=description, reason="OUT_OF_RANGE")


def _schedule_from_dict(values: Mapping[str, Any]) -> LearningRateSchedule:
    shape = values.get("decay_shape")
    enums = {"kind": ScheduleKind(values["kind"]), "decay_shape": None if shape is None else DecayShape(shape)}
    return LearningRateSchedule(**{**values, **enums})


def _part(cls: type[_Part], values: Mapping[str, Any]) -> _Part:
    enums = {name: _ENUMS[name](values[name]) for name in values if name in _ENUMS}
    return cls(**{**values, **enums})


def _has_other_limit(stop: Mapping[str, Any]) -> bool:
    return bool(stop.get("max_epochs") or stop.get("max_duration_s"))


def _is_limited_by_time_alone(stop: Mapping[str, Any]) -> bool:
    return bool(stop["max_duration_s"] > 0) and not (stop["max_steps"] or stop["max_epochs"])


def _out_of_range(values: Mapping[str, Any], path: str, *, stored: bool = False) -> Iterator[Violation]:
    """Yield what is out of range, by the names of the contract, where a duration has no unit; or by the stored ones."""
    for name, legal in _RANGES.items():
        value: Any = values
        for part in name.split("."):
            value = value[part]
        if value not in legal:
            field, unit = name if stored else name.removesuffix("_s"), " seconds" if name.endswith("_s") else ""
            yield Violation(
                field=f"{path}.{field}", description=f"is {value:g}{unit}, must be {legal}", reason="OUT_OF_RANGE"
            )


def _conflicts(values: Mapping[str, Any], path: str) -> Iterator[Violation]:
    model, data, optimization, stop = (values[part] for part in ("model", "data", "optimization", "stop"))

    def conflict(field: str, description: str) -> Violation:
        return Violation(field=f"{path}.{field}", description=description, reason="CONFLICT")

    if model["heads"] > 0 and model["d_model"] % model["heads"]:
        yield conflict("model.heads", f"{model['heads']} does not divide model.d_model, which is {model['d_model']}")
    yield from _sampling_conflicts(data, path)
    if model["positions"] is Positions.ROPE and model["heads"] > 0 and model["d_model"] // model["heads"] % 2:
        width = model["d_model"] // model["heads"]
        yield conflict("model.heads", f"makes heads of width {width}, which must be even: ROPE rotates pairs")
    if model["d_model"] % 2:
        yield conflict("model.d_model", f"is {model['d_model']}, must be even (sines and cosines come in pairs)")
    if optimization["batch_target_tokens"] < data["max_sentence_tokens"]:
        yield conflict(
            "optimization.batch_target_tokens",
            f"is {optimization['batch_target_tokens']}, must be at least data.max_sentence_tokens, "
            f"which is {data['max_sentence_tokens']}, so that every sentence fits a batch",
        )
    if optimization["batch_target_tokens"] < optimization["accumulation_steps"] * data["max_sentence_tokens"]:
        yield conflict(
            "optimization.accumulation_steps",
            f"is {optimization['accumulation_steps']}: a micro-batch would have fewer tokens than "
            f"data.max_sentence_tokens, which is {data['max_sentence_tokens']}",
        )
    if optimization["precision"] is Precision.FP16 and optimization["max_skipped_updates"] == 0:
        text = "is 0, must be at least 1 with FP16, which finds its loss scale by updates that are skipped"
        yield conflict("optimization.max_skipped_updates", text)
    if values["validation"]["metric"] is not SelectionMetric.LOSS and 100 < stop["target_score"] <= 1000:
        name = values["validation"]["metric"].name
        yield conflict("stop.target_score", f"is {stop['target_score']:g}, but {name} ends at 100")
    if not (stop["max_steps"] or _has_other_limit(stop)):
        yield conflict("stop", "must set max_steps, max_epochs or a maximum duration, else training never ends")


def _sampling_conflicts(data: Mapping[str, Any], path: str) -> Iterator[Violation]:
    for name, algorithm in (
        ("subword_regularization_alpha", SubwordAlgorithm.UNIGRAM),
        ("bpe_dropout", SubwordAlgorithm.BPE),
    ):
        if data[name] > 0 and data["subword_algorithm"] is not algorithm:
            text = f"is {data[name]:g}, but belongs to subword_algorithm {algorithm.name}"
            yield Violation(field=f"{path}.data.{name}", description=text, reason="CONFLICT")


@dataclass(frozen=True, kw_only=True)
class _ScheduleDefaults:
    """What a schedule's fields default to; `total_steps` and `max_duration_s` 0 are no limits."""

    d_model: int
    warmup_steps: int
    total_steps: int = 0
    max_duration_s: float = 0.0
    in_recipe: bool = False


def _resolve_schedule(
    overrides: Overrides, path: str, defaults: _ScheduleDefaults
) -> tuple[LearningRateSchedule | None, list[Violation]]:
    kind = overrides.get("kind", ScheduleKind.NOAM)
    warmup_steps = overrides.get("warmup_steps", defaults.warmup_steps)
    default_of = {
        "factor": 1.0,
        "d_model": defaults.d_model,
        "peak_learning_rate": 1e-3,
        "minimum_learning_rate": 0.0,
        "total_steps": defaults.total_steps,
        "decay_share": _DECAY_SHARE,
        "decay_shape": DecayShape.LINEAR,
    }
    if kind is ScheduleKind.WSD and defaults.in_recipe and defaults.d_model > 0 and warmup_steps > 0:
        default_of["peak_learning_rate"] = defaults.d_model**-0.5 * warmup_steps**-0.5
    known = _SCHEDULE_FIELDS[kind]
    values = {name: overrides.get(name, default_of[name]) for name in known}
    values["warmup_steps"] = warmup_steps
    violations = [
        Violation(
            field=f"{path}.{name}",
            description=f"does not belong to {kind.name}, which knows {', '.join(('warmup_steps', *known))}",
            reason="CONFLICT",
        )
        for name in overrides
        if name not in ("kind", "warmup_steps", *known)
    ]
    if "total_steps" in known and "total_steps" not in overrides and defaults.total_steps == 0:
        values.pop("total_steps")
        if (text := _missing_total_steps(kind, defaults)) is not None:
            violations.append(Violation(field=f"{path}.total_steps", description=text, reason="REQUIRED"))
    violations += [
        Violation(
            field=f"{path}.{name}", description=f"is {value:g}, must be {_SCHEDULE_RANGES[name]}", reason="OUT_OF_RANGE"
        )
        for name, value in values.items()
        if name in _SCHEDULE_RANGES and value not in _SCHEDULE_RANGES[name]
    ]
    violations += _schedule_conflicts(values, path)
    return (None, violations) if violations else (LearningRateSchedule(kind=kind, **values), [])


def _missing_total_steps(kind: ScheduleKind, defaults: _ScheduleDefaults) -> str | None:
    """Return why a schedule needs `total_steps`; None if it does not."""
    if kind is ScheduleKind.WSD:
        is_enough = defaults.max_duration_s > 0 or not defaults.in_recipe
        return None if is_enough else "is needed by WSD: set it, stop.max_steps or a maximum duration in stop"
    text = f"is needed by {kind.name}: set it, or stop.max_steps"
    if defaults.max_duration_s > 0:
        text += "; or use WSD, which plans its decay so that it ends within the maximum duration"
    return text


def _schedule_conflicts(values: Mapping[str, Any], path: str) -> Iterator[Violation]:
    warmup, total = values["warmup_steps"], values.get("total_steps", math.inf)
    if 1 <= total <= warmup:
        text = f"is {total}, must be above warmup_steps, which is {warmup}"
        yield Violation(field=f"{path}.total_steps", description=text, reason="CONFLICT")
    share = values.get("decay_share", 0.0)
    if "total_steps" in values and share in _SCHEDULE_RANGES["decay_share"] and 1 <= warmup < total:
        decay = decay_steps(share, total)
        if warmup + decay > total:
            text = f"is {share:g}, which is {decay} of {total} steps: with {warmup} warmup_steps they are too many"
            yield Violation(field=f"{path}.decay_share", description=text, reason="CONFLICT")
    peak, minimum = values.get("peak_learning_rate", math.inf), values.get("minimum_learning_rate", 0.0)
    if minimum > peak:
        text = f"is {minimum:g}, must not be above peak_learning_rate, which is {peak:g}"
        yield Violation(field=f"{path}.minimum_learning_rate", description=text, reason="CONFLICT")
