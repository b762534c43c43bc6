"""The service's configuration: one frozen object. `config/sources.py` fills it from flags, environment and file.

A new option is a field here, a line in HELP, and one in RANGES if it is a number.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ENVIRONMENT_PREFIX: Final = "FERRYMAN_"
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})")


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


class LogFormat(enum.StrEnum):
    """How lines of the log look: for a person, or a JSON object each."""

    CONSOLE = "console"
    JSON = "json"


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A value that cannot be, and the options that it comes from."""

    options: tuple[str, ...]
    text: str


class ConfigMistakes(ValueError):
    """The configuration cannot work; holds every mistake, and how the log is to tell of them."""

    def __init__(self, mistakes: Sequence[Mistake], log_format: LogFormat = LogFormat.CONSOLE) -> None:
        assert mistakes, "there is at least one mistake"
        super().__init__("\n".join(mistake.text for mistake in mistakes))
        self.mistakes = tuple(mistakes)
        self.log_format = log_format


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """Everything `ferryman-service serve` can be told; each field is a flag, an environment variable and a key of the
    configuration file."""

    host: str = "127.0.0.1"
    port: int = 50051
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9464
    metrics_host_names: str = ""
    probe_host: str = "127.0.0.1"
    probe_port: int = 50052
    data_dir: Path = Path("ferryman-data")
    roles: frozenset[Role] = frozenset(Role)
    reflection: bool = True
    max_concurrent_runs: int = 1
    max_queued_runs: int = 100
    max_unfinished_runs: int = 1000
    max_parameters: int = 4_000_000_000
    max_batch_tokens: int = 1_000_000
    max_run_hours: float = 0.0
    max_restarts: int = 5
    restart_backoff_s: float = 1.0
    pause_grace_s: float = 600.0
    worker_silence_s: float = 300.0
    processes_per_run: int = 1
    max_processes_per_run: int = 8
    worker_nice: int = 3
    max_corpus_bytes: int = 4 * 2**30
    min_free_mib: int = 0
    keep_checkpoints_days: float = 30.0
    max_prepared_mib: int = 65_536
    translation_threads: int = 0
    compute_type: ComputeChoice = ComputeChoice.AUTO
    max_batch_rows: int = 0
    max_sentences: int = 1024
    queue_tokens: int = 0
    max_translation_tokens: int = 0
    cache_memory_mib: int = 0
    max_loaded_models: int = 4
    model_memory_mib: int = 0
    drain_s: float = 0.0
    grace_s: float = 10.0
    max_connection_age_s: float = 1800.0
    max_connection_age_grace_s: float = 3600.0
    answer_memory_mib: int = 256
    max_calls: int = 512
    max_streams: int = 256
    max_transfers: int = 64
    max_connections: int = 1024
    message_memory_mib: int = 1024
    heartbeat_s: float = 10.0
    device: Device = Device.AUTO
    log_level: str = "INFO"
    log_format: LogFormat = LogFormat.CONSOLE
    log_sentences: bool = False
    trace_endpoint: str = ""
    trace_sample_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that cannot work, all at once."""
        if mistakes := [*self._out_of_range(), *self._conflicts()]:
            raise ConfigMistakes(mistakes)

    def _out_of_range(self) -> Iterator[Mistake]:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                text = f"{flag_of(name)} is {value:.15g}, must be from {low:.15g} to {high:.15g}"
                yield Mistake(options=(name,), text=text)
        if not self.roles:
            yield Mistake(options=("roles",), text="--roles must name training, translation or both")

    def _conflicts(self) -> Iterator[Mistake]:
        if self.processes_per_run > self.max_processes_per_run:
            text = (
                f"--processes-per-run is {self.processes_per_run}, must not be above --max-processes-per-run, which is "
                f"{self.max_processes_per_run}"
            )
            yield Mistake(options=("processes_per_run", "max_processes_per_run"), text=text)
        if self.device is Device.CPU and self.compute_type is ComputeChoice.FP16:
            text = "--compute-type is fp16, which is for CUDA; on a CPU use fp32 or int8"
            yield Mistake(options=("compute_type", "device"), text=text)
        if self.device is Device.CUDA and self.compute_type in (ComputeChoice.FP32, ComputeChoice.INT8):
            text = f"--compute-type is {self.compute_type}, which is for a CPU; on CUDA use fp16"
            yield Mistake(options=("compute_type", "device"), text=text)
        for name in host_names(self.metrics_host_names):
            if not _HOST_NAME.fullmatch(name):
                text = f"--metrics-host-names has {name!r}, must be host names without ports, such as ferryman.example"
                yield Mistake(options=("metrics_host_names",), text=text)
        if self.trace_endpoint and not re.fullmatch(r"https?://[^/@\s]+/?", self.trace_endpoint):
            is_like = "must be like http://localhost:4317 or https://host:4317"
            text = f"--trace-endpoint is {self.trace_endpoint!r}, {is_like}"
            if "@" in self.trace_endpoint:  # what is before it may be a password
                text = f"--trace-endpoint holds a user name, {is_like}; give credentials in OTEL_EXPORTER_OTLP_HEADERS"
            yield Mistake(options=("trace_endpoint",), text=text)


RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "port": (0, 65_535),
    "metrics_port": (0, 65_535),
    "probe_port": (0, 65_535),
    "max_concurrent_runs": (1, 64),
    "max_queued_runs": (1, 100_000),
    "max_unfinished_runs": (1, 1_000_000),
    "max_parameters": (0, 2**50),
    "max_batch_tokens": (0, 10_000_000),
    "max_run_hours": (0, 1_000_000),
    "max_restarts": (0, 1000),
    "restart_backoff_s": (0, 60),
    "pause_grace_s": (1, 86_400),
    "worker_silence_s": (5, 86_400),
    "processes_per_run": (1, 1024),
    "max_processes_per_run": (1, 1024),
    "worker_nice": (0, 19),
    "max_corpus_bytes": (1, 2**50),
    "min_free_mib": (0, 2**30),
    "keep_checkpoints_days": (0, 36_500),
    "max_prepared_mib": (0, 2**30),
    "translation_threads": (0, 256),
    "max_batch_rows": (0, 65_536),
    "max_sentences": (1, 100_000),
    "queue_tokens": (0, 2**40),
    "max_translation_tokens": (0, 4096),
    "cache_memory_mib": (0, 2**30),
    "max_loaded_models": (1, 1000),
    "model_memory_mib": (0, 2**30),
    "drain_s": (0, 3600),
    "grace_s": (0, 3600),
    "max_connection_age_s": (0, 604_800),
    "max_connection_age_grace_s": (0, 604_800),
    "answer_memory_mib": (64, 2**20),
    "max_calls": (1, 100_000),
    "max_streams": (1, 100_000),
    "max_transfers": (1, 100_000),
    "max_connections": (1, 1_000_000),
    "message_memory_mib": (8, 2**20),
    "heartbeat_s": (0.01, 3600),
    "trace_sample_ratio": (0, 1),
}
"""The least and the greatest value of each option that is a number."""

HELP: Final[Mapping[str, str]] = {
    "host": "address to serve gRPC on",
    "port": "port to serve gRPC on; 0 takes a free one",
    "metrics_host": "address of the Prometheus endpoint",
    "metrics_port": "port of the Prometheus endpoint; 0 turns it off",
    "metrics_host_names": "host names, with commas between them, that the Prometheus endpoint answers to beyond "
    "localhost and metrics_host; where it listens beyond loopback it answers to every IP address",
    "probe_host": "address of the probe port",
    "probe_port": "port that serves nothing but health checks, for probes that can neither encrypt nor authenticate; 0 "
    "turns it off",
    "data_dir": "folder of the database, corpora, runs and models; made if missing",
    "roles": "what this process does: training, translation, or both with a comma between them",
    "reflection": "serve gRPC reflection, which grpcurl and its like need",
    "max_concurrent_runs": "runs that train at the same time",
    "max_queued_runs": "runs that may wait; more are refused",
    "max_unfinished_runs": "runs that may be unfinished in all: waiting, paused or training; more are refused",
    "max_parameters": "most parameters of a model that may be trained; 0: no limit. A model whose weights, gradients "
    "and moments do not fit into the memory is refused in any case",
    "max_batch_tokens": "most target tokens of an update; 0: no limit",
    "max_run_hours": "most hours that a run may train, which its recipe must then limit itself to; 0: no limit",
    "max_restarts": "workers of a run that may die one after another without getting further before it fails",
    "restart_backoff_s": "seconds before a worker that died is followed by another; doubles each time, up to 60",
    "pause_grace_s": "seconds that a worker gets to write its checkpoint after PauseTraining before it is killed",
    "worker_silence_s": "seconds without a sign of life after which a worker is killed and followed by another; a "
    "worker gives one every second, whatever it does",
    "processes_per_run": "processes that train one run together, unless its caller says otherwise",
    "max_processes_per_run": "most processes that a caller may ask for",
    "worker_nice": "nice value that training adds to the service's own, so that translation goes first where both want "
    "the same core; 0: equal priority",
    "max_corpus_bytes": "largest corpus that may be uploaded, bytes",
    "min_free_mib": "MiB of the data folder's disk that must stay free: below, uploads, imports and new runs are "
    "refused, and runs in progress go on; 0: 5 % of the disk, at most 2048",
    "keep_checkpoints_days": "days after which the checkpoints of an ended run are removed, but for the last one of a "
    "run that made a published version, which fine-tuning with keep_optimizer starts from; 0: never",
    "max_prepared_mib": "MiB of disk that tokenised corpora may take, which runs share; the least recently used are "
    "removed first, those of running runs never, and are made again when they are needed; 0: no limit",
    "translation_threads": "threads that decode for each loaded model, each on one core; 0: one for each usable CPU, "
    "at most one for each 512 MiB of usable memory",
    "compute_type": "arithmetic of translation: on a CPU fp32, or int8, which is faster and costs a little quality; on "
    "a GPU fp16; auto is fp32 or fp16",
    "max_batch_rows": "rows (sentences times beam) that a decoding thread runs at the same time for small calls, as "
    "many for large ones, and as many for long sentences; 0: on a CPU 160, of models wider than 256 80, on a GPU 1024",
    "max_sentences": "most sentences in one Translate call",
    "queue_tokens": "source subwords times beam, or half of the maximum length times beam if that is longer than the "
    "default, that may wait or run before Translate calls are refused; streams may have as many again, and wait; 0: "
    "131,072 for each decoding thread, at least 262,144",
    "max_translation_tokens": "most subwords of a translation, whatever max_length a caller asks for; 0: the model's "
    "max_sentence_tokens",
    "cache_memory_mib": "MiB of memory that the sentences being translated may come to take, of all models together, "
    "if each becomes as long as it may; a sentence that has no room waits; 0: half of the usable memory, on a GPU no "
    "limit",
    "max_loaded_models": "models kept in memory, the least recently used leaving first",
    "model_memory_mib": "MiB of memory that the models kept in memory may take, with caches; 0: half of the usable "
    "memory, on a GPU no limit",
    "drain_s": "seconds between saying NOT_SERVING and beginning to stop, in which calls are still taken: as long as "
    "balancers need to notice",
    "grace_s": "seconds that calls in flight get to end when the service stops",
    "max_connection_age_s": "seconds after which a connection is asked to end, so that clients spread anew over the "
    "servers; 0: never",
    "max_connection_age_grace_s": "seconds that the calls on such a connection get to end before they are cut",
    "answer_memory_mib": "MiB of large answers that may wait for their callers to read them, a quarter of it on one "
    "connection; further calls with large answers wait, and are refused after 10 s",
    "max_calls": "calls in flight of all callers, health checks aside; further ones are refused before their message "
    "is read",
    "max_streams": "StreamMetrics, StreamTranslate and reflection calls among them",
    "max_transfers": "uploads and downloads among them; they are also refused while half of the open files are used",
    "max_connections": "connections of all callers; further ones are closed. At most a quarter of the open files",
    "message_memory_mib": "MiB of memory for messages that have not arrived completely, each counted as 4 MiB, the "
    "largest: half for streams of messages, half for single ones; calls without a part of it are refused",
    "heartbeat_s": "seconds of silence after which a metrics stream says that it lives",
    "device": "where models are trained and run: auto, cpu or cuda",
    "log_level": "DEBUG, INFO, WARNING or ERROR",
    "log_format": "lines of the log: console, for a person, or json",
    "log_sentences": "log what is translated, and its translations; else no text of a sentence is ever logged",
    "trace_endpoint": "where traces are sent, by OTLP over gRPC, such as http://localhost:4317; empty: nowhere",
    "trace_sample_ratio": "share of the traces that begin here which are kept, from 0 to 1; a caller's own decision "
    "counts first",
}


def host_names(text: str) -> Sequence[str]:
    """Return the host names in a text that has commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def flag_of(name: str) -> str:
    """Return the flag of an option."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """Return the environment variable of an option."""
    return ENVIRONMENT_PREFIX + name.upper()
