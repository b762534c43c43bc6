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
                f"--processes-per-run is {self.processes_per_run}, must not exceed --max-processes-per-run, which is "
                f"{self.max_processes_per_run}"
            )
            yield Mistake(options=("processes_per_run", "max_processes_per_run"), text=text)
        if self.device is Device.CPU and self.compute_type is ComputeChoice.FP16:
            text = "--compute-type is fp16, which needs CUDA; on a CPU use fp32 or int8"
            yield Mistake(options=("compute_type", "device"), text=text)
        if self.device is Device.CUDA and self.compute_type in (ComputeChoice.FP32, ComputeChoice.INT8):
            text = f"--compute-type is {self.compute_type}, which needs a CPU; on CUDA use fp16"
            yield Mistake(options=("compute_type", "device"), text=text)
        for name in host_names(self.metrics_host_names):
            if not _HOST_NAME.fullmatch(name):
                text = (
                    f"--metrics-host-names has {name!r}, must list host names without ports, such as ferryman.example"
                )
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
    "host": "Serve gRPC on this address.",
    "port": "Serve gRPC on this port. 0 picks a free port.",
    "metrics_host": "Serve Prometheus metrics on this address.",
    "metrics_port": "Serve Prometheus metrics on this port. 0 turns metrics off.",
    "metrics_host_names": "Accept these Host headers on the metrics endpoint: a comma-separated list of host names. "
    "localhost and metrics_host are always accepted. Beyond loopback, every IP address is accepted too.",
    "probe_host": "Serve health probes on this address.",
    "probe_port": "Serve health checks alone on this port, in plain text, for probes without TLS or authentication. 0 "
    "turns the probe port off.",
    "data_dir": "Keep the database, corpora, runs and models in this folder. It is created if missing.",
    "roles": "Set the roles of this process: training, translation, or both, separated by a comma.",
    "reflection": "Serve gRPC reflection, which tools such as grpcurl need.",
    "max_concurrent_runs": "Train at most this many runs at the same time.",
    "max_queued_runs": "Queue at most this many runs. Further runs are refused.",
    "max_unfinished_runs": "Hold at most this many unfinished runs: queued, paused and training. Further runs are "
    "refused.",
    "max_parameters": "Refuse to train models with more parameters. 0: no limit. A model whose weights, gradients and "
    "optimizer moments exceed the memory is always refused.",
    "max_batch_tokens": "Limit the target tokens of one update. 0: no limit.",
    "max_run_hours": "Refuse runs whose recipe does not limit the training time to at most this many hours. 0: no "
    "limit.",
    "max_restarts": "Fail a run after more than this many worker deaths in a row without progress.",
    "restart_backoff_s": "Wait this many seconds before a worker that died is replaced. The wait doubles each time, up "
    "to 60.",
    "pause_grace_s": "Give a worker this many seconds after PauseTraining to write its checkpoint, then kill it.",
    "worker_silence_s": "Kill and replace a worker after this many seconds without a heartbeat. A healthy worker sends "
    "one every second.",
    "processes_per_run": "Train each run with this many processes, unless the caller sets the number.",
    "max_processes_per_run": "Limit the number of processes that a caller may request for a run.",
    "worker_nice": "Add this nice value to training workers, so that translation gets the larger share of a contended "
    "core. 0: equal priority.",
    "max_corpus_bytes": "Refuse uploads of corpora larger than this many bytes.",
    "min_free_mib": "Keep this many MiB of the data folder's disk free. Below, uploads, imports and new runs are "
    "refused; runs in progress continue. 0: 5 % of the disk, at most 2048.",
    "keep_checkpoints_days": "Delete the checkpoints of ended runs after this many days. The last checkpoint of a run "
    "with a published version is kept: fine-tuning with keep_optimizer starts from it. 0: never delete.",
    "max_prepared_mib": "Limit the disk space of tokenised corpora, which runs share, to this many MiB. The least "
    "recently used are deleted first and rebuilt on demand; corpora of running runs are kept. 0: no limit.",
    "translation_threads": "Decode each loaded model with this many threads, one core each. 0: one thread for each "
    "usable CPU, at most one for each 512 MiB of usable memory.",
    "compute_type": "Set the arithmetic of translation. CPU: fp32, or int8, which is faster and costs a little "
    "quality. GPU: fp16. auto: fp32 on a CPU, fp16 on a GPU.",
    "max_batch_rows": "Limit the rows (sentences times beam) that a decoding thread runs at the same time. The limit "
    "applies separately to small calls, large calls and long sentences. 0: 160 on a CPU, 80 for models wider than 256, "
    "1024 on a GPU.",
    "max_sentences": "Limit the sentences of one Translate call.",
    "queue_tokens": "Refuse Translate calls when this many tokens wait or run. A sentence counts its source subwords "
    "times beam, or half of max_length times beam if max_length exceeds its default. Streams have a separate queue of "
    "the same size, and wait. 0: 131,072 for each decoding thread, at least 262,144.",
    "max_translation_tokens": "Limit the subwords of a translation, whatever max_length the caller sets. 0: the "
    "model's max_sentence_tokens.",
    "cache_memory_mib": "Limit the decoding caches of all models together to this many MiB, counted as if every "
    "sentence reached its maximum length. Sentences beyond the limit wait. 0: half of the usable memory; on a GPU no "
    "limit.",
    "max_loaded_models": "Keep at most this many models in memory. The least recently used is unloaded first.",
    "model_memory_mib": "Limit the memory of loaded models, with their caches, to this many MiB. 0: half of the usable "
    "memory; on a GPU no limit.",
    "drain_s": "Keep accepting calls for this many seconds after health turns NOT_SERVING, so that load balancers "
    "notice before the service stops.",
    "grace_s": "Give calls in flight this many seconds to end when the service stops.",
    "max_connection_age_s": "Ask each connection to close after this many seconds, so that clients spread over the "
    "servers again. 0: never.",
    "max_connection_age_grace_s": "Give the calls of an expired connection this many seconds to end, then cut them.",
    "answer_memory_mib": "Limit large responses that clients have not read yet to this many MiB, a quarter of it for "
    "each connection. Further calls with large responses wait, and are refused after 10 s.",
    "max_calls": "Limit the calls in flight of all clients, health checks excluded. Further calls are refused before "
    "their message is read.",
    "max_streams": "Limit the StreamMetrics, StreamTranslate and reflection calls among the calls in flight.",
    "max_transfers": "Limit the uploads and downloads among the calls in flight. They are also refused while half of "
    "the file descriptors are in use.",
    "max_connections": "Limit the connections of all clients; further connections are closed. At most a quarter of the "
    "file descriptors is used.",
    "message_memory_mib": "Limit the memory of partly received messages to this many MiB. Each counts as 4 MiB, the "
    "largest message. Half is for streams of messages, half for single messages. Calls beyond the limit wait 5 s, "
    "then are refused.",
    "heartbeat_s": "Send a heartbeat on a metrics stream after this many seconds without a record.",
    "device": "Train and run models on this device: auto, cpu or cuda.",
    "log_level": "Log messages of this level and above: DEBUG, INFO, WARNING or ERROR.",
    "log_format": "Write the log as console, for people, or as json.",
    "log_sentences": "Log source sentences and translations. Without this option no text of a sentence is logged.",
    "trace_endpoint": "Send traces by OTLP over gRPC to this endpoint, such as http://localhost:4317. Empty: none.",
    "trace_sample_ratio": "Sample this share, 0 to 1, of the traces that start here. A caller's own decision wins.",
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
