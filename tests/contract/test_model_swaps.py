"""Models come, move and go under callers that never stop: no call fails, none is served by what is gone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from ferryman.v1 import model_pb2, translation_pb2
from ferryman_service.application.loaded_models import LoadingLimits
from tests.fakes.bundle_loader import SpyBundleLoader


@pytest.fixture
def loader():
    return SpyBundleLoader()


@pytest.fixture
def make_swapping(make_service, loader):
    """A maker of services with version 1 of "m", which is "production"."""

    def make(**limits):
        service = make_service(loader=loader, loading_limits=LoadingLimits(**limits))
        service.import_model("m")
        set_alias(service, 1)
        return service

    return make


def set_alias(service, version):
    request = model_pb2.SetModelAliasRequest(name="m", alias="production", version=version)
    return service.model_stub.SetModelAlias(request)


def by_model(service, method, model):
    return getattr(service.model_stub, method)(getattr(model_pb2, f"{method}Request")(model=model))


def translate(service, model):
    """Return the version that answered, which must be the one that the answer names."""
    answer = service.translation_stub.Translate(translation_pb2.TranslateRequest(model=model, sentences=["x"]))
    assert answer.translations[0].hypotheses[0].text == answer.model
    return int(answer.model.partition("/")[2])


@pytest.mark.parametrize("limits", [{}, {"max_loaded_models": 1}, {"memory_bytes": 150}])
def test_no_call_fails_while_versions_are_published_moved_and_deleted(make_swapping, loader, limits, eventually):
    service = make_swapping(**limits)
    stop, served = threading.Event(), {"m": set(), "m@production": set()}

    def call(model):
        last = 0
        while not stop.is_set():
            version = translate(service, model)
            assert version >= last, "nobody sees an older version after a newer one"
            last = version
            served[model].add(version)

    with ThreadPoolExecutor(6) as threads:
        callers = [threads.submit(call, model) for model in served for _ in range(3)]
        try:
            for version in range(2, 12):
                service.import_model("m")
                set_alias(service, version)
                by_model(service, "DeleteModelVersion", f"m/{version - 1}")
                if version % 3 == 0:
                    by_model(service, "UnloadModel", "m")
                threading.Event().wait(0.02)
        finally:
            stop.set()
        for caller in callers:
            caller.result(timeout=20)
    assert all(len(versions) > 5 for versions in served.values())
    eventually(lambda: set(loader.open()) <= {"m/11"})
    assert [model.versions for model in service.models.list_page(None, 9)] == [(11,)]


def test_no_call_by_an_alias_waits_for_a_load(make_swapping, loader):
    service = make_swapping()
    translate(service, "m@production")
    service.import_model("m")
    loader.began.clear()
    loader.gate.clear()
    with ThreadPoolExecutor() as threads:
        moving = threads.submit(set_alias, service, 2)
        assert loader.began.wait(10)
        assert {translate(service, "m@production") for _ in range(5)} == {1}
        loader.gate.set()
        moving.result(timeout=10)
        loader.gate.clear()  # whatever loads now waits for ever
        assert {translate(service, "m@production") for _ in range(5)} == {2}
        loader.gate.set()
    assert loader.loads == ["m/1", "m/2"]


def test_a_download_goes_on_although_its_version_is_deleted(make_swapping):
    service = make_swapping()
    call = service.model_stub.DownloadModel(model_pb2.DownloadModelRequest(model="m"), timeout=20)
    header = next(call).header
    service.import_model("m")
    set_alias(service, 2)
    by_model(service, "DeleteModelVersion", "m/1")
    sizes = dict.fromkeys(range(len(header.files)), 0)
    for response in call:
        sizes[response.chunk.file] += len(response.chunk.data)
    assert list(sizes.values()) == [file.size_bytes for file in header.files]
    with pytest.raises(grpc.RpcError) as caught:
        list(service.model_stub.DownloadModel(model_pb2.DownloadModelRequest(model="m/1")))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_unloading_lets_a_translation_in_flight_end(make_service, eventually):
    service = make_service()
    service.import_model("m")
    call = service.translation_stub.Translate.future(
        translation_pb2.TranslateRequest(model="m", sentences=["wait"]), timeout=30
    )
    assert service.loader.translator.busy.wait(10)
    unloading = service.model_stub.UnloadModel.future(model_pb2.UnloadModelRequest(model="m"), timeout=30)
    eventually(lambda: not service.model_stub.ListLoadedModels(model_pb2.ListLoadedModelsRequest()).loaded_models)
    assert not unloading.done()
    call.cancel()
    assert unloading.result(timeout=10).was_loaded
