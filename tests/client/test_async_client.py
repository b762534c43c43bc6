from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from ferryman import AsyncClient, Client, LearningRateSchedule, Recipe, RunState, errors
from ferryman.testing import FakeFerryman


@pytest.fixture
async def async_client(fake: FakeFerryman) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fake.target) as client:
        yield client


async def test_run_from_corpus_to_translation(fake, async_client):
    corpus = await async_client.upload_corpus("toy", "en", "de", train=[("a", "b")], validation=[("c", "d")])
    assert (await async_client.get_corpus(corpus.corpus_id)) == corpus
    run = await async_client.start_training(corpus.corpus_id, "m", Recipe(preset="base"))
    seen = []
    run = await async_client.wait(run.run_id, seen.append)
    assert (run.state, len(seen)) == (RunState.SUCCEEDED, len(fake.script))
    assert (await async_client.translate("m", "hallo")).translations[0].text == "HALLO"
    assert (await async_client.get_model("m")).version.reference == "m/1"
    curve = await async_client.get_lr_schedule(schedule=LearningRateSchedule(), last_step=5)
    assert len(curve.points) == 5
    assert [run.run_id async for run in async_client.list_training_runs()] == [run.run_id]
    assert [model.name async for model in async_client.list_models()] == ["m"]
    assert [c.corpus_id async for c in async_client.list_corpora()] == [corpus.corpus_id]


async def test_model_version_lifecycle(fake, async_client, tmp_path):
    fake.add_model("m"), fake.add_model("m")
    assert (await async_client.set_model_alias("m", "production", 1)).aliases[0].version == 1
    assert (await async_client.translate("m@production", "x")).model == "m/1"
    assert (await async_client.load_model("m")).model == "m/2"
    assert [loaded.model for loaded in await async_client.list_loaded_models()] == ["m/2", "m/1"]
    assert await async_client.unload_model("m/2")
    version = await async_client.download_model("m@production", tmp_path / "bundle")
    assert version.reference == "m/1"
    assert sum(file.stat().st_size for file in (tmp_path / "bundle").iterdir()) == version.size_bytes
    with pytest.raises(errors.ModelInUse):
        await async_client.delete_model_version("m/1")
    await async_client.delete_model_alias("m", "production")
    await async_client.delete_model_version("m/1")
    assert (await async_client.get_model("m")).model.versions == (2,)


async def test_cancelled_download_leaves_no_folder(fake, async_client, tmp_path):
    fake.add_model("m")
    task = asyncio.create_task(async_client.download_model("m", tmp_path / "bundle"))
    while not list(tmp_path.iterdir()):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(tmp_path.iterdir()) == []


async def test_calls_raise_ferryman_errors(async_client):
    with pytest.raises(errors.ModelNotFound, match="nope"):
        await async_client.translate("nope", "x")
    with pytest.raises(errors.RunNotFound):
        await async_client.cancel_training("run_x")
    with pytest.raises(errors.RunNotFound):
        await anext(async_client.stream_metrics("run_x"))


async def test_exception_of_pairs_reaches_caller(async_client):
    def pairs() -> Iterator[tuple[str, str]]:
        yield "a", "b"
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        await async_client.upload_corpus("toy", "en", "de", train=pairs(), validation=[("c", "d")])
    assert [corpus async for corpus in async_client.list_corpora()] == []


async def test_cancelling_task_cancels_call():
    arrived, gate = threading.Event(), threading.Event()

    def slow(sentence: str) -> str:
        arrived.set()
        gate.wait(10)
        return sentence

    with FakeFerryman(translate=slow) as fake:
        fake.add_model("m")
        async with AsyncClient(fake.target) as client:
            task = asyncio.create_task(client.translate("m", "x"))
            await asyncio.to_thread(arrived.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        gate.set()


def test_both_clients_have_the_same_methods_and_arguments():
    def methods(cls: type) -> dict[str, list[str]]:
        public = {name: value for name, value in vars(cls).items() if callable(value) and not name.startswith("_")}
        return {name: list(inspect.signature(value).parameters) for name, value in public.items()}

    assert methods(Client) == methods(AsyncClient)
