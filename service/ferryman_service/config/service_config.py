"""The service's configuration: one frozen object, read once from flags and environment."""

from __future__ import annotations

import argparse
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ENVIRONMENT_PREFIX: Final = "FERRYMAN_"


class Role(enum.StrEnum):
    """What a process does."""

    TRAINING = "training"
    TRANSLATION = "translation"


class Device(enum.StrEnum):
    """Where models run. AUTO: CUDA if there is a GPU, else the CPU."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class ComputeChoice(enum.StrEnum):
    """The arithmetic of translation. AUTO: FP16 where models run on a GPU, else FP32."""

    AUTO = "auto"
    FP32 = "fp32"
    INT8 = "int8"
    FP16 = "fp16"


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """Everything `ferryman-service serve` can be told; each field is a flag and an environment variable."""

    host: str = "127.0.0.1"
    port: int = 50051
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9464
    data_dir: Path = Path("ferryman-data")
    roles: frozenset[Role] = frozenset(Role)
    reflection: bool = True
    max_concurrent_runs: int = 1
    max_queued_runs: int = 100
    max_restarts: int = 5
    restart_backoff_s: float = 1.0
    pause_grace_s: float = 600.0
    processes_per_run: int = 1
    max_processes_per_run: int = 8
    max_corpus_bytes: int = 4 * 2**30
    translation_threads: int = 2
    compute_type: ComputeChoice = ComputeChoice.AUTO
    max_batch_rows: int = 0
    max_sentences: int = 1024
    queue_tokens: int = 262_144
    max_loaded_models: int = 4
    model_memory_mib: int = 0
    grace_s: float = 10.0
    heartbeat_s: float = 10.0
    device: Device = Device.AUTO
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        legal: Mapping[str, tuple[float, float]] = {
            "port": (0, 65_535),
            "metrics_port": (0, 65_535),
            "max_concurrent_runs": (1, 64),
            "max_queued_runs": (1, 100_000),
            "max_restarts": (0, 1000),
            "restart_backoff_s": (0, 60),
            "pause_grace_s": (1, 86_400),
            "processes_per_run": (1, 1024),
            "max_processes_per_run": (1, 1024),
            "max_corpus_bytes": (1, 2**50),
            "translation_threads": (1, 256),
            "max_batch_rows": (0, 65_536),
            "max_sentences": (1, 100_000),
            "queue_tokens": (1, 2**40),
            "max_loaded_models": (1, 1000),
            "model_memory_mib": (0, 2**30),
            "grace_s": (0, 3600),
            "heartbeat_s": (0.01, 3600),
        }
        for name, (low, high) in legal.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{_flag(name)} is {value:g}, must be from {low:g} to {high:g}")
        if self.processes_per_run > self.max_processes_per_run:
            raise ValueError(
                f"--processes-per-run is {self.processes_per_run}, must not be above --max-processes-per-run, which is "
                f"{self.max_processes_per_run}"
            )
        if self.device is Device.CPU and self.compute_type is ComputeChoice.FP16:
            raise ValueError("--compute-type is fp16, which is for CUDA; on a CPU use fp32 or int8")
        if self.device is Device.CUDA and self.compute_type in (ComputeChoice.FP32, ComputeChoice.INT8):
            raise ValueError(f"--compute-type is {self.compute_type}, which is for a CPU; on CUDA use fp16")
        if not self.roles:
            raise ValueError("--roles must name training, translation or both")


_HELP: Final[Mapping[str, str]] = {
    "host": "address to serve gRPC on",
    "port": "port to serve gRPC on; 0 takes a free one",
    "metrics_host": "address of the Prometheus endpoint",
    "metrics_port": "port of the Prometheus endpoint; 0 turns it off",
    "data_dir": "folder of the database, corpora, runs and models; made if missing",
    "roles": "what this process does: training, translation, or both with a comma between them",
    "reflection": "serve gRPC reflection, which grpcurl and its like need",
    "max_concurrent_runs": "runs that train at the same time",
    "max_queued_runs": "runs that may wait; more are refused",
    "max_restarts": "workers of a run that may die one after another without getting further before it fails",
    "restart_backoff_s": "seconds before a worker that died is followed by another; doubles each time, up to 60",
    "pause_grace_s": "seconds that a worker gets to write its checkpoint after PauseTraining before it is killed",
    "processes_per_run": "processes that train one run together, unless its caller says otherwise",
    "max_processes_per_run": "most processes that a caller may ask for",
    "max_corpus_bytes": "largest corpus that may be uploaded, bytes",
    "translation_threads": "threads that decode for each loaded model, each on one core",
    "compute_type": "arithmetic of translation: on a CPU fp32, or int8, which is faster and costs a little quality; on "
    "a GPU fp16; auto is fp32 or fp16",
    "max_batch_rows": "rows (sentences times beam) that a decoding thread runs at the same time; 0: on a CPU 160, of "
    "models wider than 256 80, on a GPU 1024",
    "max_sentences": "most sentences in one Translate call",
    "queue_tokens": "source subwords times beam that may wait or run before Translate calls are refused; streams may "
    "have as many again, and wait",
    "max_loaded_models": "models kept in memory, the least recently used leaving first",
    "model_memory_mib": "MiB of memory that the models kept in memory may take together; 0: no such limit",
    "grace_s": "seconds that calls in flight get to end when the service stops",
    "heartbeat_s": "seconds of silence after which a metrics stream says that it lives",
    "device": "where models are trained and run: auto, cpu or cuda",
    "log_level": "DEBUG, INFO, WARNING or ERROR",
}


def add_arguments(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Add a flag for every field; its default is the environment's value if there is one."""
    defaults = ServiceConfig()
    for name, text in _HELP.items():
        default = getattr(defaults, name)
        variable = ENVIRONMENT_PREFIX + name.upper()
        convert = _converter(name, default)
        options: dict[str, Any] = {"type": convert}
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        if variable in environment:
            default = _from_environment(parser, variable, environment[variable], convert)
        shown = ",".join(sorted(default)) if isinstance(default, frozenset) else default
        parser.add_argument(_flag(name), default=default, help=f"{text} [{variable}] (default: {shown})", **options)


def config_from(arguments: argparse.Namespace) -> ServiceConfig:
    """Return the configuration; raises ValueError naming the flag that is wrong."""
    return ServiceConfig(**{name: getattr(arguments, name) for name in _HELP})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _converter(name: str, default: object) -> Callable[[str], Any]:
    if name == "roles":
        return _roles
    if name == "log_level":
        return _log_level
    return _truth if isinstance(default, bool) else type(default) if not isinstance(default, Path) else Path


def _from_environment(
    parser: argparse.ArgumentParser, variable: str, text: str, convert: Callable[[str], Any]
) -> object:
    try:
        return convert(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(f"{variable}={text!r}: {error}")


def _roles(text: str) -> frozenset[Role]:
    names: Iterable[str] = (part.strip() for part in text.split(","))
    return frozenset(Role(name) for name in names if name)


def _log_level(text: str) -> str:
    legal: Sequence[str] = ("DEBUG", "INFO", "WARNING", "ERROR")
    if text.upper() not in legal:
        raise ValueError(f"must be one of {', '.join(legal)}")
    return text.upper()


def _truth(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in values:
        raise ValueError("must be true or false")
    return values[text.lower()]
