"""The whole service but for workers and models: real use cases, stores and gRPC server, in a thread of this process."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time

import grpc

from ferryman.v1 import (
    corpus_pb2,
    corpus_pb2_grpc,
    model_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
    translation_pb2_grpc,
)
from ferryman_service.application.corpora import CorpusUseCases
from ferryman_service.application.loaded_models import LoadedModels, LoadingLimits
from ferryman_service.application.metrics_feed import FeedConfig, MetricsFeed
from ferryman_service.application.models import ModelUseCases
from ferryman_service.application.paging import Pager
from ferryman_service.application.run_limits import RunLimits
from ferryman_service.application.training import TrainingUseCases
from ferryman_service.application.translating import TranslationLimits, TranslationUseCases
from ferryman_service.domain.records import RunState
from ferryman_service.domain.runs import ProcessIdentity
from ferryman_service.domain.threads import Threads, ThreadsBySize
from ferryman_service.domain.tracing import NULL_TRACER
from ferryman_service.observability.http import new_registry
from ferryman_service.observability.rpc import RpcMetrics
from ferryman_service.observability.translation import TranslationMetrics
from ferryman_service.rpc import server as rpc
from ferryman_service.rpc.call_scope import CallScopes
from ferryman_service.rpc.corpora import CorpusServicer, UploadThreads
from ferryman_service.rpc.health import CORPORA, MODELS, TRAINING, TRANSLATION, HealthServicer
from ferryman_service.rpc.interceptors import CallInterceptor
from ferryman_service.rpc.models import ModelServicer
from ferryman_service.rpc.request_limits import DEFAULT_LIMITS
from ferryman_service.rpc.shutdown import Shutdown
from ferryman_service.rpc.training import TrainingServicer
from ferryman_service.rpc.translation import TranslationServicer
from ferryman_service.rpc.translation_watch import TranslationWatch
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.free_space import FreeSpace
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.models import FileModelStore
from ferryman_service.stores.run_folders import FileRunFolders
from ferryman_service.stores.runs import SqlRunStore
from ferryman_service.text.sentences import SentencexSplitter
from tests.fakes.bundles import HEADER, write_bundle
from tests.fakes.databases import open_migrated
from tests.fakes.translator import FakeBundleLoader

WORKER = ProcessIdentity(pid=4242, start_ticks=7, boot_id="boot")


class LoopbackService:
    """Serves on a free loopback port from construction to `close`; its attributes are its parts and a stub each."""

    def __init__(
        self,
        root,
        *,
        trains=True,
        translates=True,
        heartbeat_s=30.0,
        max_corpus_bytes=1_000_000,
        max_queued_runs=1000,
        queue_tokens=TranslationLimits.queue_tokens,
        loader=None,
        loading_limits=None,
        examine=lambda bundle: None,
        tracer=NULL_TRACER,
        log_sentences=False,
        messages=None,
        **config,
    ):
        self.folder = DataFolder(root / "data")
        self.folder.create()
        self.database = open_migrated(self.folder.database)
        self.runs = SqlRunStore(self.database)
        self.space = FreeSpace(self.folder.root)
        limits = CorpusLimits(max_bytes=max_corpus_bytes)
        self.corpora = FileCorpusStore(self.database, self.folder, limits, self.space)
        self.models = FileModelStore(self.database, self.folder, self.space, examine=examine)
        self.loader = loader or FakeBundleLoader()
        self.loaded = LoadedModels(self.models, self.loader, loading_limits or LoadingLimits()) if translates else None
        self.registry = new_registry()
        self._trains, self._translates, self._heartbeat_s = trains, translates, heartbeat_s
        self._max_queued_runs = max_queued_runs
        self._queue_tokens = queue_tokens
        self._tracer, self._log_sentences = tracer, log_sentences
        self._messages = messages
        self._bundles = itertools.count(1)
        self._feed_threads = Threads(2, "feed")
        self._writes = Threads(4, "write")
        self._upload_threads = UploadThreads(writing=Threads(2, "upload"), checking=ThreadsBySize(2, "check", 1 << 24))
        self._limits = config.get("limits", DEFAULT_LIMITS)
        self._rpc_config = rpc.RpcConfig(
            port=config.pop("port", 0),
            **config,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self.port = self.wait_for(self._start())
        except BaseException:
            self._end()
            raise
        self.address = f"127.0.0.1:{self.port}"
        self.channel = grpc.insecure_channel(self.address, (("grpc.enable_http_proxy", 0),))
        self.training_stub = training_pb2_grpc.TrainingServiceStub(self.channel)
        self.corpus_stub = corpus_pb2_grpc.CorpusServiceStub(self.channel)
        self.model_stub = model_pb2_grpc.ModelServiceStub(self.channel)
        self.translation_stub = translation_pb2_grpc.TranslationServiceStub(self.channel)

    def wait_for(self, coroutine):
        """Run a coroutine in the service's event loop; return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=30)

    def stop(self, grace_s=5.0):
        """Stop as SIGTERM does; return how many seconds it took. Callers keep their channel."""
        began_s = time.monotonic()
        self._loop.call_soon_threadsafe(self.health.begin_stop)
        self.wait_for(self._server.stop(grace_s))
        return time.monotonic() - began_s

    def close(self):
        """End everything; harmless after stop."""
        self.stop(grace_s=0)
        self._translation.close()
        self._models.close()
        if self.loaded is not None:
            self.loaded.close()
        self.channel.close()
        self._end()

    def metric(self, name, **labels):
        """Return a sample of the service's registry, 0 if there is none."""
        return self.registry.get_sample_value(name, labels) or 0

    def upload(self, pairs=(("one two", "eins zwei"),), **header):
        """Upload pairs for both splits; return the corpus."""
        return self.corpus_stub.UploadCorpus(iter(upload_messages(pairs, **header))).corpus

    def start_run(self, **fields):
        """Start a run on a new corpus; return it."""
        request = training_pb2.StartTrainingRequest(corpus_id=self.upload().corpus_id, model_name="en-de", **fields)
        return self.training_stub.StartTraining(request).run

    def claimed_run(self):
        """Start a run and claim its attempt 1, as a worker would; return its id. It has three records."""
        run_id = self.start_run().run_id
        self.runs.begin_attempt(run_id, 0)
        self.runs.claim_attempt(run_id, 1, WORKER)
        return run_id

    def import_model(self, name, *, weights=False, run_id=HEADER.lineage.run_id):
        """Publish a bundle that nobody can translate with but the fake loader, nor train from."""
        folder = self.folder.root / "elsewhere" / str(next(self._bundles))
        return self.models.import_bundle(write_bundle(folder, weights=weights, run_id=run_id), name)

    def trained_model(self, name):
        """Publish a version that training can start from, of a run that has ended and left a checkpoint; return the
        version and the run's id."""
        run_id = self.claimed_run()
        (self.folder.run_dir(run_id) / "checkpoints" / "step-0000000007").mkdir(parents=True)
        self.runs.change_state(run_id, 1, RunState.CANCELLED)
        return self.import_model(name, weights=True, run_id=run_id), run_id

    async def _start(self):
        pager = Pager(b"key")
        shutdown = Shutdown()
        training = TrainingUseCases(
            runs=self.runs,
            folders=FileRunFolders(self.folder),
            corpora=self.corpora,
            models=self.models,
            pager=pager,
            served=self._trains,
            limits=RunLimits(max_queued=self._max_queued_runs, max_processes=4),
            require_space=lambda: self.space.require(),
        )
        self._models = ModelUseCases(models=self.models, loaded=self.loaded, pager=pager)
        self._translation = TranslationUseCases(
            models=self.models,
            loaded=self.loaded,
            splitter=SentencexSplitter(),
            limits=TranslationLimits(queue_tokens=self._queue_tokens),
            tracer=self._tracer,
        )
        translation_metrics = TranslationMetrics(self.registry, self._translation.queued_tokens, self._queue_tokens)
        feed = MetricsFeed(self.runs, FeedConfig(heartbeat_s=self._heartbeat_s), self._feed_threads)
        watch = TranslationWatch(self._tracer, log_sentences=self._log_sentences)
        servicers = rpc.Servicers(
            training=TrainingServicer(training, feed, shutdown, self._writes, self._tracer),
            corpora=CorpusServicer(
                CorpusUseCases(corpora=self.corpora, pager=pager), self._upload_threads, self._writes
            ),
            models=ModelServicer(self._models, self._writes),
            translation=TranslationServicer(self._translation, translation_metrics, shutdown, watch),
        )
        serving = [CORPORA, MODELS, *[TRAINING] * self._trains, *[TRANSLATION] * self._translates]
        self.health = HealthServicer(shutdown, serving)
        scopes = CallScopes(self._tracer, log_sentences=self._log_sentences)
        interceptor = CallInterceptor(RpcMetrics(self.registry), shutdown, scopes, self._limits, self._messages)
        self._server = rpc.RpcServer(servicers, self.health, interceptor, shutdown, self._rpc_config)
        return await self._server.start()

    def _end(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        if tasks := asyncio.all_tasks(self._loop):
            self._loop.run_until_complete(asyncio.wait(tasks, timeout=5))
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        uploads = self._upload_threads
        for threads in (self._feed_threads, self._writes, uploads.writing, uploads.checking):
            threads.close()
        self._loop.close()
        self.database.dispose()


def upload_messages(pairs, **header):
    """Return the messages of an upload of the same pairs for both splits."""
    header = {"source_language": "en", "target_language": "de", **header}
    wire = [corpus_pb2.SentencePair(source=source, target=target) for source, target in pairs]
    return [
        corpus_pb2.UploadCorpusRequest(header=corpus_pb2.UploadHeader(**header)),
        *(
            corpus_pb2.UploadCorpusRequest(pairs=corpus_pb2.PairBatch(split=split, pairs=wire))
            for split in (corpus_pb2.SPLIT_TRAIN, corpus_pb2.SPLIT_VALIDATION)
        ),
    ]
