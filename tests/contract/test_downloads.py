"""Downloads with the real client: what arrives is what was published, or nothing."""

import asyncio
import os

import pytest

from ferryman import AsyncClient, Client, errors
from ferryman.v1 import model_pb2
from tests.fakes.bundles import write_bundle

ENCODER = os.urandom(5 << 19)  # two chunks and a half


@pytest.fixture
def service(make_service, tmp_path):
    service = make_service()
    service.models.import_bundle(write_bundle(tmp_path / "bundle", weights=True, encoder=ENCODER), "m")
    return service


@pytest.fixture
def bundle(service):
    return service.folder.bundle_dir("m", 1)


def open_files(folder):
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.exists(link) and os.readlink(link).startswith(str(folder))]


def download(service, folder):
    with Client(service.address) as client:
        return client.download_model("m", folder)


def download_async(service, folder):
    async def call():
        async with AsyncClient(service.address) as client:
            return await client.download_model("m", folder)

    return asyncio.run(call())


@pytest.mark.parametrize("call", [download, download_async])
def test_a_download_can_be_published_elsewhere(service, make_service, bundle, tmp_path, call, eventually):
    target = tmp_path / "target"
    version = call(service, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in bundle.iterdir()
    }
    eventually(lambda: not open_files(bundle))
    imported = make_service().models.import_bundle(target, "elsewhere")
    assert (imported.digest, imported.reference) == (version.digest, "elsewhere/1")


@pytest.mark.parametrize("call", [download, download_async])
def test_a_file_that_was_changed_on_the_server_is_noticed(service, bundle, tmp_path, call):
    (bundle / "encoder.onnx").chmod(0o644)
    (bundle / "encoder.onnx").write_bytes(ENCODER[:-1] + bytes([ENCODER[-1] ^ 1]))
    target = tmp_path / "target" / "m"
    target.parent.mkdir()
    with pytest.raises(errors.ModelDamaged, match=r"encoder\.onnx"):
        call(service, target)
    assert list(target.parent.iterdir()) == []


def test_chunks_are_a_mebibyte_at_most(service):
    responses = service.model_stub.DownloadModel(model_pb2.DownloadModelRequest(model="m"))
    files = next(responses).header.files
    chunks = [response.chunk for response in responses]
    encoder = [(chunk.offset, len(chunk.data)) for chunk in chunks if files[chunk.file].name == "encoder.onnx"]
    assert encoder == [(0, 1 << 20), (1 << 20, 1 << 20), (2 << 20, 1 << 19)]


def test_a_download_that_is_given_up_closes_its_files(service, bundle, eventually):
    call = service.model_stub.DownloadModel(model_pb2.DownloadModelRequest(model="m"))
    assert next(call).HasField("header")
    assert open_files(bundle)
    call.cancel()
    eventually(lambda: not open_files(bundle))
