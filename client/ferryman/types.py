"""The SDK's types: frozen dataclasses with the field names of the contract.

Durations are seconds and end in `_s`; times are aware datetimes in UTC. A field that the service did not set is None.
Enumerations are strings; arguments also accept the plain value (`Recipe(preset="tiny")`).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, TypedDict

NOT_ON_THE_WIRE: Final = {"wire": False}
"""Marks a field that the message of its dataclass does not have."""

# --- Recipes ----------------------------------------------------------------------------------------------------------


class Preset(enum.StrEnum):
    """Named starting points of a recipe."""

    TINY = "tiny"
    SMALL = "small"
    BASE = "base"
    BIG = "big"
    DEEP_SHALLOW = "deep_shallow"


class NormPlacement(enum.StrEnum):
    """POST: LayerNorm(x + Sublayer(x)), the paper's form. PRE: x + Sublayer(LayerNorm(x)). DEEP: POST for tens of
    layers (DeepNorm)."""

    POST = "post"
    PRE = "pre"
    DEEP = "deep"


class Activation(enum.StrEnum):
    """The activation function of feed-forward sublayers."""

    RELU = "relu"
    GELU = "gelu"
    SWIGLU = "swiglu"


class Positions(enum.StrEnum):
    """The position encoding."""

    SINUSOIDAL = "sinusoidal"
    ROPE = "rope"


class Precision(enum.StrEnum):
    """The floating-point format of matrix products in training."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Averaging(enum.StrEnum):
    """Which checkpoints are averaged at the end of training."""

    LAST = "last"
    BEST = "best"
    NONE = "none"


class SubwordAlgorithm(enum.StrEnum):
    """The subword algorithm of SentencePiece."""

    UNIGRAM = "unigram"
    BPE = "bpe"


class ScheduleKind(enum.StrEnum):
    """The shape of a learning-rate schedule after its linear warmup."""

    NOAM = "noam"
    INVERSE_SQRT = "inverse_sqrt"
    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"
    WSD = "wsd"


class DecayShape(enum.StrEnum):
    """The shape of WSD's decay over p, the share of its steps that are done: 1 - p, or 1 - sqrt(p)."""

    LINEAR = "linear"
    ONE_MINUS_SQRT = "one_minus_sqrt"


class SelectionMetric(enum.StrEnum):
    """The validation score that decides which weights are the best."""

    LOSS = "loss"
    BLEU = "bleu"
    CHRF = "chrf"


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The network. Ranges and defaults: protos/ferryman/v1/recipe.proto, as for every part of a recipe."""

    d_model: int | None = None
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    heads: int | None = None
    ffn_dim: int | None = None
    dropout: float | None = None
    attention_dropout: float | None = None
    activation_dropout: float | None = None
    norm: NormPlacement | str | None = None
    activation: Activation | str | None = None
    positions: Positions | str | None = None


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Subwords, and which training pairs are used."""

    vocabulary_size: int | None = None
    subword_algorithm: SubwordAlgorithm | str | None = None
    character_coverage: float | None = None
    max_sentence_tokens: int | None = None
    max_length_ratio: float | None = None
    subword_regularization_alpha: float | None = None
    bpe_dropout: float | None = None
    split_digits: bool | None = None
    reduce_vocabulary: bool | None = None


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """A learning-rate schedule, a function of the step (from 1), and for WSD of the decays that the run has planned.

    NOAM uses `factor` and `d_model`, the other kinds `peak_learning_rate`. COSINE, LINEAR and WSD also use
    `minimum_learning_rate` and `total_steps`, WSD also `decay_share` and `decay_shape`. All use `warmup_steps`.
    """

    kind: ScheduleKind | str | None = None
    warmup_steps: int | None = None
    factor: float | None = None
    d_model: int | None = None
    peak_learning_rate: float | None = None
    minimum_learning_rate: float | None = None
    total_steps: int | None = None
    decay_share: float | None = None
    decay_shape: DecayShape | str | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizationRecipe:
    """Adam, weight decay, clipping by global norm (0: off), label smoothing, target tokens per update, R-Drop, moving
    average of the weights, precision, and what happens when a gradient is not finite."""

    adam_beta1: float | None = None
    adam_beta2: float | None = None
    adam_epsilon: float | None = None
    clip_norm: float | None = None
    label_smoothing: float | None = None
    batch_target_tokens: int | None = None
    accumulation_steps: int | None = None
    weight_decay: float | None = None
    r_drop_alpha: float | None = None
    ema_decay: float | None = None
    precision: Precision | str | None = None
    max_skipped_updates: int | None = None
    max_rollbacks: int | None = None
    rollback_rate_scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class StopRecipe:
    """The limits of training; the first one reached ends it. 0 is no limit.

    With WSD, `patience` and `target_score` start the decay, and the run ends after it.
    """

    max_steps: int | None = None
    max_epochs: int | None = None
    max_duration_s: float | None = None
    patience: int | None = None
    target_score: float | None = None


@dataclass(frozen=True, kw_only=True)
class ValidationRecipe:
    """Validation, checkpoints, and the choice of the weights that are published."""

    interval_steps: int | None = None
    max_translated_pairs: int | None = None
    metric: SelectionMetric | str | None = None
    keep_last: int | None = None
    averaging: Averaging | str | None = None
    checkpoint_interval_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The model to train, and how. None selects the preset's value; recipes from the service have no None."""

    preset: Preset | str | None = None
    model: ModelRecipe | None = None
    data: DataRecipe | None = None
    schedule: LearningRateSchedule | None = None
    optimization: OptimizationRecipe | None = None
    stop: StopRecipe | None = None
    validation: ValidationRecipe | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class LearningRatePoint:
    """One point of a curve."""

    step: int
    learning_rate: float


class DecayReason(enum.StrEnum):
    """Why a run's learning rate begins to decay; UNKNOWN is a reason newer than this client."""

    UNKNOWN = "unknown"
    TIME = "time"
    TARGET_SCORE = "target_score"
    PATIENCE = "patience"


@dataclass(frozen=True, kw_only=True)
class DecayPlan:
    """A decay of the learning rate that a run has planned: the first step with a decayed rate, and the step at which
    the minimum is reached and the run ends. A later plan replaces what follows its first step."""

    first_step: int
    last_step: int
    reason: DecayReason


@dataclass(frozen=True, kw_only=True)
class LearningRateCurve:
    """A learning-rate curve by rising step, its resolved schedule, the peak of the whole schedule, and the decays that
    the run has planned.

    Rates from `provisional_from_step` on may still change, because the run has yet to plan its decay, or may shorten
    it; None: none may.
    """

    points: tuple[LearningRatePoint, ...]
    schedule: LearningRateSchedule
    peak: LearningRatePoint
    decays: tuple[DecayPlan, ...] = ()
    provisional_from_step: int | None = None


# --- Corpora ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SentencePair:
    """A sentence and its translation."""

    source: str
    target: str


@dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """Statistics of a split of a corpus. Words are separated by white space; empty pairs have an empty side."""

    pairs: int
    source_words: int
    target_words: int
    empty_pairs: int
    samples: tuple[SentencePair, ...]


@dataclass(frozen=True, kw_only=True)
class CorpusWarning:
    """A probable mistake in a corpus, in `count` of `total` lines or pairs; `example` is the first.

    `field` is a split or a file, such as "train.source". The codes: protos/ferryman/v1/corpus.proto.
    """

    code: str
    field: str
    message: str
    count: int
    total: int
    example: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A stored corpus; it never changes. `digest` is the SHA-256 of its content, hexadecimal.

    `unreadable` says why the server cannot read it, in a list; then only the id is to be relied upon, and
    `delete_corpus` removes it. It is empty for every other corpus.
    """

    corpus_id: str
    display_name: str
    source_language: str
    target_language: str
    train: SplitStatistics
    validation: SplitStatistics
    digest: str
    create_time: datetime
    warnings: tuple[CorpusWarning, ...] = ()
    unreadable: str = ""


# --- Metrics ----------------------------------------------------------------------------------------------------------


class RunState(enum.StrEnum):
    """The state of a run. SUCCEEDED, FAILED and CANCELLED are terminal; UNKNOWN is a state newer than this client.

    A PAUSED run waits for `resume_training`. A run that waits for a new worker, because its worker died, is QUEUED.
    """

    UNKNOWN = "unknown"
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    EXPORTING = "exporting"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the state is final."""
        return self in (RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED)


class EventLevel(enum.StrEnum):
    """How serious an event is; UNKNOWN is a level newer than this client."""

    UNKNOWN = "unknown"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One update of the weights. Losses in nats per target token; padding is never counted as a token.

    `padding_share` is 0 to 1; `gradient_norm` is the global L2 norm before clipping. `skipped`: the update was not
    applied, its gradient was not finite. `model_flops_utilization` is 0 to 1, 0 where the device's peak is not known.
    """

    step: int
    epoch: int
    loss: float
    nll_per_token: float
    perplexity: float
    learning_rate: float
    gradient_norm: float
    target_tokens: int
    target_tokens_per_second: float
    duration_s: float
    padding_share: float
    memory_bytes: int
    skipped: bool = False
    model_flops_utilization: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ValidationMetrics:
    """One validation: losses over all validation pairs, BLEU and chrF (0 to 100) of greedy translations.
    `bleu_signature` is sacreBLEU's, with the tokenizer."""

    step: int
    epoch: int
    loss: float
    nll_per_token: float
    perplexity: float
    bleu: float
    chrf: float
    translated_pairs: int
    duration_s: float
    best: bool
    bleu_signature: str = ""


@dataclass(frozen=True, kw_only=True)
class StateChange:
    """The run changed state; `attempt` counts its workers from 1, `message` may be empty."""

    state: RunState
    attempt: int = 0
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class RunEvent:
    """An event of a run, with a message for people; `code` is a stable UPPER_SNAKE_CASE identifier."""

    level: EventLevel
    code: str
    message: str


MetricPayload = StepMetrics | ValidationMetrics | StateChange | RunEvent | DecayPlan
"""The payload of a record."""


@dataclass(frozen=True, kw_only=True)
class MetricRecord:
    """One durable record of a run; sequences rise by exactly one from 1."""

    sequence: int
    time: datetime
    payload: MetricPayload


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """A heartbeat: every record up to `last_sequence` was sent. The next message follows within `interval_s`."""

    last_sequence: int
    state: RunState
    interval_s: float


# --- Training runs ----------------------------------------------------------------------------------------------------


class RunOrder(enum.StrEnum):
    """The order of a list of runs, by the time they were accepted."""

    NEWEST_FIRST = "newest_first"
    OLDEST_FIRST = "oldest_first"


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """The progress of a run. `fraction` (0 to 1) and `remaining_s` refer to the nearest limit of the recipe."""

    step: int = 0
    epoch: int = 0
    target_tokens: int = 0
    target_tokens_per_second: float = 0.0
    fraction: float = 0.0
    remaining_s: float | None = None
    best_validation: ValidationMetrics | None = None
    skipped_updates: int = 0


@dataclass(frozen=True, kw_only=True)
class RunError:
    """Why a run failed: a stable UPPER_SNAKE_CASE reason, a message with the cure, the end of the worker's log."""

    reason: str
    message: str
    log_tail: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A training run. Of a run that was only validated `run_id` is empty and `create_time` None.

    `restarts` counts the workers in a row that died, or gave up, without a step of their own; `initial_model` is None
    or the version, "name/7", whose weights it starts from, and `keep_optimizer` says whether it starts with that
    version's optimizer. `corpus_deleted` says that its corpus is gone.

    `unreadable` says why the server cannot read it, in a list; then only the id is to be relied upon, and
    `delete_training_run` removes it. It is empty for every other run.
    """

    run_id: str
    state: RunState
    corpus_id: str
    model_name: str
    recipe: Recipe
    model_version: int | None = None
    progress: RunProgress = field(default_factory=RunProgress)
    error: RunError | None = None
    cancel_requested: bool = False
    attempt: int = 0
    last_sequence: int = 0
    create_time: datetime | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None
    pause_requested: bool = False
    restarts: int = 0
    initial_model: str | None = None
    processes: int = 1
    keep_optimizer: bool = False
    unreadable: str = ""
    corpus_deleted: bool = False


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint of a run; the scores are None if its weights were not validated."""

    step: int
    epoch: int
    create_time: datetime
    size_bytes: int
    best: bool
    bleu: float | None = None
    chrf: float | None = None
    nll_per_token: float | None = None
    translated_pairs: int | None = None


# --- Models -----------------------------------------------------------------------------------------------------------


class PublishedWeights(enum.StrEnum):
    """The weights that a run publishes: those of one checkpoint, or the average of several.

    UNKNOWN is a kind newer than this client.
    """

    UNKNOWN = "unknown"
    CHECKPOINT = "checkpoint"
    AVERAGE = "average"


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """Scores on the validation pairs (greedy). BLEU and chrF are those of `translated_pairs`, the loss is that of
    `loss_pairs`; 0 if not known. `bleu_signature` is sacreBLEU's, with the tokenizer; empty if not known.

    `step` is that of the checkpoint, or the last step of the average.
    """

    bleu: float
    chrf: float
    nll_per_token: float
    weights: PublishedWeights
    step: int
    translated_pairs: int = 0
    loss_pairs: int = 0
    bleu_signature: str = ""


@dataclass(frozen=True, kw_only=True)
class Int8Outcome:
    """The measured effect of int8 on a version before its publication: sacreBLEU of the same held-out pairs in float32
    and in int8, None without pairs. `kept`: the version includes int8, because int8 loses at most 0.3 BLEU."""

    pairs: int
    kept: bool
    fp32_bleu: float | None = None
    int8_bleu: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """A published version; it never changes. `parameters` counts trained weights. `int8` is None if its cost was not
    recorded, as in versions of an earlier release. `initial_model` is None or the version, "name/7", whose weights
    training started from.

    `unreadable` says why the server cannot read it, in a list; then only name and number are to be relied upon, and
    `delete_model_version` removes it. It is empty for every other version.
    """

    name: str
    version: int
    source_language: str
    target_language: str
    run_id: str
    corpus_id: str
    recipe: Recipe
    scores: ModelScores
    parameters: int
    size_bytes: int
    digest: str
    create_time: datetime
    int8: Int8Outcome | None = None
    unreadable: str = ""
    initial_model: str | None = None

    @property
    def reference(self) -> str:
        """The exact reference for `translate` and `get_model`: "name/version"."""
        return f"{self.name}/{self.version}"


@dataclass(frozen=True, kw_only=True)
class ModelAlias:
    """A name for one version of a model, which can be moved to another; `update_time` is when it was last set."""

    alias: str
    version: int
    update_time: datetime


@dataclass(frozen=True, kw_only=True)
class Model:
    """A name with its newest version, the numbers of all, rising, and its aliases, by name. `unreadable` says of each
    version and alias that the server cannot read why."""

    name: str
    latest_version: ModelVersion
    versions: tuple[int, ...]
    aliases: tuple[ModelAlias, ...] = ()
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelDetails:
    """A model and the requested version."""

    model: Model
    version: ModelVersion


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A version in the memory of the server, "name/version". `load_duration_s`: to read it and to warm it up."""

    model: str
    memory_bytes: int
    load_duration_s: float


@dataclass(frozen=True, kw_only=True)
class DownloadFile:
    """A file of a published version; `sha256` is hexadecimal."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class DownloadHeader:
    """The first message of a download: the version, and its files in the order of transmission."""

    version: ModelVersion
    files: tuple[DownloadFile, ...]


@dataclass(frozen=True, kw_only=True)
class DownloadChunk:
    """A chunk of a file: the index of the file in the header, from 0, and the chunk's byte offset in the file."""

    file: int
    offset: int
    data: bytes


# --- Translation ------------------------------------------------------------------------------------------------------


class EarlyStopping(enum.StrEnum):
    """When beam search stops: at the FIRST beam_size finished hypotheses, or when no better one is possible."""

    FIRST = "first"
    OPTIMAL = "optimal"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Random sampling from the model's distribution; None selects the service's default.

    Logits are divided by `temperature`. Tokens are sampled from the `top_k` most probable (0: all), reduced to the
    smallest set with the total probability `top_p`. The same `seed` gives the same samples.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None


class TranslateOptions(TypedDict, total=False):
    """The options of beam search and sampling: the keyword arguments that `translate` and `translate_stream` share.

    Ranges and defaults: protos/ferryman/v1/translation.proto, message TranslateOptions.
    """

    beam_size: int | None
    n_best: int | None
    length_penalty: float | None
    max_length: int | None
    max_length_ratio: float | None
    min_length: int | None
    beam_patience: float | None
    early_stopping: EarlyStopping | str | None
    sampling: Sampling | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    return_token_scores: bool | None
    return_alignment: bool | None


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One translation of a sentence. `score` is log_probability / target_tokens ** length_penalty (natural logarithm).

    `finished` is False if the hypothesis was cut at the length limit. `pieces` are its subwords, with
    `return_token_scores` or `return_alignment`; `token_log_probabilities` belong to them, and so does `alignment`: the
    source piece, from 0, that each looks at most.
    """

    text: str
    score: float
    log_probability: float
    target_tokens: int
    finished: bool
    pieces: tuple[str, ...] = ()
    token_log_probabilities: tuple[float, ...] = ()
    alignment: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Translation:
    """The hypotheses for one sentence, best first. `source_pieces` are the source's subwords, when the hypotheses have
    theirs."""

    hypotheses: tuple[Hypothesis, ...]
    source_tokens: int
    source_pieces: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The text of the best hypothesis; empty if the constraints of the search leave none."""
        return self.hypotheses[0].text if self.hypotheses else ""


@dataclass(frozen=True, kw_only=True)
class TranslateTimings:
    """The time that the server spent on a request, by stage, in seconds.

    `queue_s`, `encode_s`, `decode_s` and `steps` are of the sentence that took most; `mean_batch_rows` is how many rows
    (sentences times beam, other callers' included) a decoding step computed.
    """

    queue_s: float
    text_s: float
    encode_s: float
    decode_s: float
    total_s: float
    steps: int = 0
    mean_batch_rows: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TranslationResult:
    """One translation per sentence, in their order, and the model that made them, "name/version"."""

    model: str
    translations: tuple[Translation, ...]
    timings: TranslateTimings


@dataclass(frozen=True, kw_only=True)
class StreamSentence:
    """A sentence of a stream, with the caller's id and a target prefix."""

    id: str
    sentence: str
    target_prefix: str = ""


@dataclass(frozen=True, kw_only=True)
class SentenceError:
    """The error of a sentence of a stream: a stable UPPER_SNAKE_CASE reason, and a message with the cure."""

    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class StreamTranslation:
    """The result of a sentence of a stream: either `translation` or `error` is set. `id` is the caller's, or the
    sentence's number from 0; `model` is the model
    version, "name/version"."""

    id: str
    translation: Translation | None = None
    error: SentenceError | None = None
    model: str = field(default="", metadata=NOT_ON_THE_WIRE)


@dataclass(frozen=True, kw_only=True)
class StreamTranslateResponse:
    """Translations of a stream that have finished, and the model that made them, "name/version"."""

    model: str
    translations: tuple[StreamTranslation, ...]
