"""The client of Ferryman, a service that trains encoder-decoder Transformers and translates with them.

    from ferryman import Client

    with Client("localhost:50051") as client:
        print(client.translate("en-de", "the fifth of March").translations[0].text)

`AsyncClient` is the same for asyncio, `ferryman.errors` the tree of errors, `ferryman.testing` a fake service for
tests.
"""

from importlib.metadata import version

from ferryman import errors
from ferryman._async_client import AsyncClient
from ferryman._client import Client
from ferryman.types import (
    Activation,
    Averaging,
    Checkpoint,
    Corpus,
    DataRecipe,
    EventLevel,
    Heartbeat,
    Hypothesis,
    LearningRateCurve,
    LearningRatePoint,
    LearningRateSchedule,
    MetricPayload,
    MetricRecord,
    Model,
    ModelDetails,
    ModelRecipe,
    ModelScores,
    ModelVersion,
    NormPlacement,
    OptimizationRecipe,
    Positions,
    Precision,
    Preset,
    Recipe,
    RunError,
    RunEvent,
    RunOrder,
    RunProgress,
    RunState,
    ScheduleKind,
    SelectionMetric,
    SentencePair,
    SplitStatistics,
    StateChange,
    StepMetrics,
    StopRecipe,
    SubwordAlgorithm,
    TrainingRun,
    TranslateTimings,
    Translation,
    TranslationResult,
    ValidationMetrics,
    ValidationRecipe,
)

__version__ = version("ferryman")

__all__ = [
    "Activation",
    "AsyncClient",
    "Averaging",
    "Checkpoint",
    "Client",
    "Corpus",
    "DataRecipe",
    "EventLevel",
    "Heartbeat",
    "Hypothesis",
    "LearningRateCurve",
    "LearningRatePoint",
    "LearningRateSchedule",
    "MetricPayload",
    "MetricRecord",
    "Model",
    "ModelDetails",
    "ModelRecipe",
    "ModelScores",
    "ModelVersion",
    "NormPlacement",
    "OptimizationRecipe",
    "Positions",
    "Precision",
    "Preset",
    "Recipe",
    "RunError",
    "RunEvent",
    "RunOrder",
    "RunProgress",
    "RunState",
    "ScheduleKind",
    "SelectionMetric",
    "SentencePair",
    "SplitStatistics",
    "StateChange",
    "StepMetrics",
    "StopRecipe",
    "SubwordAlgorithm",
    "TrainingRun",
    "TranslateTimings",
    "Translation",
    "TranslationResult",
    "ValidationMetrics",
    "ValidationRecipe",
    "errors",
]
