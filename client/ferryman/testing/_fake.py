"""The fake service."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, Self

import grpc

from ferryman import errors, types
from ferryman.testing._backend import Backend, Pair
from ferryman.testing._script import noam_learning_rate, training_script
from ferryman.testing._servicers import CorpusServicer, ModelServicer, TrainingServicer, TranslationServicer
from ferryman.v1 import corpus_pb2_grpc, model_pb2_grpc, training_pb2_grpc, translation_pb2_grpc

# The service's own options: requests of 4 MiB, a ping every ten seconds, no sharing of the port.
_SERVER_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
)


class FakeFerryman:
    """The fake service. Its data survives `stop`, so that `stop` and `start` act as a server restart."""

    def __init__(
        self,
        *,
        translate: Callable[[str], str] = str.upper,
        script: Sequence[types.MetricPayload] | None = None,
        hold_after: int | None = None,
        learning_rate: Callable[[int], float] = noam_learning_rate,
        host: str = "127.0.0.1",
        port: int = 0,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Configure the fake; `start` or a `with` block starts the server.

        `translate` translates a sentence. If it raises an error of `ferryman.errors`, the caller receives that error;
        in a stream InvalidSentence becomes the error of the sentence. `script` holds the records of every run, by
        default `training_script()`. `hold_after` stops runs after this many records, until `release` or
        CancelTraining; pausing and resuming does not release a run. `learning_rate` is the curve of GetLRSchedule. The
        server listens on `host` and `port` (0: a free port) with the gRPC server `options`, such as a connection age.
        """
        self.translate = translate
        self.script = list(script) if script is not None else training_script(learning_rate=learning_rate)
        self.hold_after = hold_after
        self.learning_rate = learning_rate
        self.calls: list[str] = []
        """The names of the RPCs received, including failed ones, in order."""
        self.translate_options: list[types.TranslateOptions] = []
        """The options set by each Translate and StreamTranslate, in order."""
        self.backend = Backend()
        self._failures: defaultdict[str, deque[errors.FerrymanError]] = defaultdict(deque)
        self._server: grpc.Server | None = None
        self._host = host
        self._port = port
        self._options = list({**dict(_SERVER_OPTIONS), **dict(options)}.items())

    @property
    def pairs(self) -> dict[str, dict[str, list[Pair]]]:
        """The sentence pairs of each corpus, by corpus id and split ("train", "validation")."""
        return self.backend.pairs

    @property
    def target(self) -> str:
        """The address for a client; a restart keeps it."""
        return f"{self._host}:{self._port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server; after `stop`, on the same port."""
        server = grpc.server(ThreadPoolExecutor(max_workers=16), options=self._options)
        training_pb2_grpc.add_TrainingServiceServicer_to_server(TrainingServicer(self), server)
        corpus_pb2_grpc.add_CorpusServiceServicer_to_server(CorpusServicer(self), server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(self), server)
        translation_pb2_grpc.add_TranslationServiceServicer_to_server(TranslationServicer(self), server)
        self._port = server.add_insecure_port(self.target)
        server.start()
        self._server = server

    def stop(self) -> None:
        """Abort all calls and close the port. Does nothing if the server is stopped."""
        if self._server is not None:
            self._server.stop(None).wait()
            self._server = None

    def release(self, run_id: str) -> None:
        """Continue a held run to the end of its script."""
        self.backend.release(run_id)

    def add_model(self, name: str) -> types.ModelVersion:
        """Publish the next version of a model without training."""
        return self.backend.publish(name, run_id="", corpus_id="", recipe=types.Recipe())

    def fail_next(self, rpc: str, error: errors.FerrymanError, times: int = 1) -> None:
        """Fail the next `times` calls of `rpc` (such as "Translate") with the error, including its `request_id`."""
        self._failures[rpc].extend([error] * times)

    def record_call(self, rpc: str) -> None:
        """Record a call. Raises the next error that `fail_next` has set for it."""
        self.calls.append(rpc)
        if self._failures[rpc]:
            raise self._failures[rpc].popleft()
