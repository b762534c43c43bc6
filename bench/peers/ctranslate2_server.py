"""The plainest server around CTranslate2: grpc.aio, our contract's Translate, and batches of what waits. Runs in an
environment of its own, which `peers.environment` makes.

Sentences wait in a queue. As soon as CTranslate2 has a free thread, what waits is gathered, for up to 5 ms or until
there are 32 sentences, and translated as one batch.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ctranslate2  # type: ignore[import-not-found]
import grpc
import sentencepiece

from ferryman.v1 import translation_pb2, translation_pb2_grpc

_END: Final = "</s>"
_MAX_LENGTH: Final = 256


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How batches are made: batches at a time, sentences at most, and how long a batch waits for more sentences."""

    threads: int
    max_sentences: int
    wait_s: float
    beam_size: int


@dataclass(frozen=True)
class _Waiting:
    pieces: list[str]
    translated: asyncio.Future[list[str]]


class Batcher:
    """Makes batches of the sentences that wait."""

    def __init__(self, translator: Any, config: BatchConfig) -> None:  # noqa: ANN401
        self._translator = translator
        self._config = config
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to translate; called once, in the event loop."""
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._config.threads)]

    async def translate(self, pieces: list[str]) -> list[str]:
        """Return the subwords of a sentence's translation."""
        waiting = _Waiting(pieces, asyncio.get_running_loop().create_future())
        await self._queue.put(waiting)
        return await waiting.translated

    async def _work(self) -> None:
        while True:
            batch = await self._gather()
            results = await asyncio.to_thread(self._translate, [waiting.pieces for waiting in batch])
            for waiting, found in zip(batch, results, strict=True):
                if not waiting.translated.done():  # the caller may have gone
                    waiting.translated.set_result(found)

    async def _gather(self) -> list[_Waiting]:
        batch = [await self._queue.get()]
        end_s = time.monotonic() + self._config.wait_s
        while len(batch) < self._config.max_sentences:
            try:
                batch.append(await asyncio.wait_for(self._queue.get(), max(0.0, end_s - time.monotonic())))
            except TimeoutError:
                break
        return batch

    def _translate(self, batch: list[list[str]]) -> list[list[str]]:
        longest = max(map(len, batch))
        results = self._translator.translate_batch(
            batch, beam_size=self._config.beam_size, max_decoding_length=min(_MAX_LENGTH, 2 * longest + 10)
        )
        return [result.hypotheses[0] for result in results]


class PlainServicer(translation_pb2_grpc.TranslationServiceServicer):
    """Translate, and nothing else of the contract."""

    def __init__(self, batcher: Batcher, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._batcher = batcher
        self._processor = processor

    async def Translate(  # noqa: N802
        self,
        request: translation_pb2.TranslateRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> translation_pb2.TranslateResponse:
        """Translate the sentences of a request."""
        sources = [self._processor.encode(sentence, out_type=str) for sentence in request.sentences]
        targets = await asyncio.gather(*(self._batcher.translate([*source, _END]) for source in sources))
        translations = [
            translation_pb2.Translation(
                hypotheses=[
                    translation_pb2.Hypothesis(text=self._processor.decode(target), target_tokens=len(target) + 1)
                ],
                source_tokens=len(source) + 1,
            )
            for source, target in zip(sources, targets, strict=True)
        ]
        return translation_pb2.TranslateResponse(model=request.model, translations=translations)


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    translator = ctranslate2.Translator(
        str(arguments.model),
        device="cpu",
        compute_type=arguments.compute_type,
        inter_threads=arguments.threads,
        intra_threads=1,
    )
    config = BatchConfig(
        threads=arguments.threads,
        max_sentences=arguments.max_sentences,
        wait_s=arguments.wait_ms / 1000,
        beam_size=arguments.beam_size,
    )
    batcher = Batcher(translator, config)
    batcher.start()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(arguments.subwords))
    server = grpc.aio.server()
    servicer = PlainServicer(batcher, processor)  # type: ignore[abstract]
    translation_pb2_grpc.add_TranslationServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"serving on 127.0.0.1:{port}", flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.stop(None)


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder that ctranslate2_convert has written")
    parser.add_argument("--subwords", type=Path, required=True, help="the bundle's subwords.model")
    parser.add_argument("--compute-type", default="float32", help="float32 or int8")
    parser.add_argument("--threads", type=int, default=2, help="batches that are translated at the same time")
    parser.add_argument("--beam-size", type=int, default=5, help="of every search, whatever a request says")
    parser.add_argument("--max-sentences", type=int, default=32, help="in a batch")
    parser.add_argument("--wait-ms", type=float, default=5.0, help="that a batch waits for more sentences")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
