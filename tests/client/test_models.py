"""The life of published versions, from the client."""

from __future__ import annotations

import hashlib

import pytest

from ferryman import errors, types
from ferryman._download import ModelFolder


def test_alias_is_a_model_reference(fake, client):
    fake.add_model("m"), fake.add_model("m")
    assert client.get_model("m").model.aliases == ()
    client.set_model_alias("m", "production", 2)
    model = client.set_model_alias("m", "production", 1)
    assert [(alias.alias, alias.version) for alias in model.aliases] == [("production", 1)]
    assert model.aliases[0].update_time.tzinfo is not None
    version = client.get_model("m@production").version
    assert version.version == 1
    assert version.int8 == types.Int8Outcome(pairs=1000, kept=True, fp32_bleu=31.5, int8_bleu=31.25)
    assert client.translate("m@production", "x").model == "m/1"
    assert client.translate("m", "x").model == "m/2"
    client.delete_model_alias("m", "production")
    with pytest.raises(errors.ModelNotFound, match="production"):
        client.translate("m@production", "x")
    with pytest.raises(errors.ModelNotFound):
        client.set_model_alias("m", "production", 3)


def test_deleted_version_number_is_not_reused(fake, client):
    fake.add_model("m"), fake.add_model("m")
    client.set_model_alias("m", "production", 2)
    with pytest.raises(errors.ModelInUse) as caught:
        client.delete_model_version("m/2")
    assert caught.value.metadata["aliases"] == "production"
    client.delete_model_alias("m", "production")
    for version in (1, 2):
        client.delete_model_version(f"m/{version}")
    assert list(client.list_models()) == []
    assert fake.add_model("m").version == 3


def test_load_list_and_unload_models(fake, client):
    fake.add_model("a"), fake.add_model("b")
    loaded = client.load_model("a")
    assert (loaded.model, loaded.load_duration_s) == ("a/1", 0.5)
    client.translate("b", "x")
    assert [loaded.model for loaded in client.list_loaded_models()] == ["b/1", "a/1"]
    assert [client.unload_model("b") for _ in range(2)] == [True, False]
    client.delete_model_version("a/1")
    assert client.list_loaded_models() == []


def test_only_idempotent_calls_are_retried(fake, client):
    fake.add_model("m")
    client.set_model_alias("m", "production", 1)
    calls = {
        "SetModelAlias": lambda: client.set_model_alias("m", "production", 1),
        "LoadModel": lambda: client.load_model("m"),
        "ListLoadedModels": client.list_loaded_models,
    }
    for name, call in calls.items():
        fake.calls.clear()
        fake.fail_next(name, errors.Unavailable("not now"))
        call()
        assert fake.calls == [name] * 2
    calls = {
        "DeleteModelAlias": lambda: client.delete_model_alias("m", "production"),
        "DeleteModelVersion": lambda: client.delete_model_version("m/1"),
        "UnloadModel": lambda: client.unload_model("m"),
    }
    for name, call in calls.items():
        fake.fail_next(name, errors.Unavailable("not now"))
        with pytest.raises(errors.Unavailable):
            call()


def test_download_equals_published_folder(fake, client, tmp_path):
    published = fake.add_model("m")
    version = client.download_model("m", tmp_path / "here" / ".." / "bundle")
    assert version == published
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    folder = tmp_path / "bundle"
    assert sorted(path.name for path in folder.iterdir()) == [
        "decoder.onnx",
        "encoder.onnx",
        "manifest.json",
        "subwords.model",
    ]
    assert sum(path.stat().st_size for path in folder.iterdir()) == version.size_bytes
    assert hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest() == version.digest


def test_existing_folder_is_refused_before_the_call(fake, client, tmp_path):
    fake.add_model("m")
    with pytest.raises(FileExistsError, match="exists"):
        client.download_model("m", tmp_path)
    with pytest.raises(FileNotFoundError):
        client.download_model("m", tmp_path / "no" / "parent")
    assert fake.calls == []


@pytest.mark.parametrize("error", [errors.ModelNotFound("no model"), errors.ModelDamaged("a file is gone")])
def test_failed_download_leaves_no_folder(fake, client, tmp_path, error):
    fake.fail_next("DownloadModel", error)
    with pytest.raises(type(error)):
        client.download_model("m", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def version(fake):
    return fake.add_model("m")


def file_of(content, name):
    return types.DownloadFile(name=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def chunk(file, offset, data):
    return types.DownloadChunk(file=file, offset=offset, data=data)


def receive(folder, items):
    with ModelFolder(folder) as target:
        for item in items:
            target.accept(item)
        return target.finish()


def header(version, *names):
    files = [file_of(content, name) for name, content in zip(names, (b"hello", b"", b"world!"), strict=False)]
    return types.DownloadHeader(version=version, files=tuple(files))


def test_files_may_arrive_in_any_chunks(tmp_path, version):
    items = [chunk(0, 0, b"hel"), chunk(0, 3, b"lo"), chunk(2, 0, b"w"), chunk(2, 1, b"orld!")]
    assert receive(tmp_path / "bundle", [header(version, "a", "b", "c"), *items]) == version
    assert {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()} == {
        "a": b"hello",
        "b": b"",
        "c": b"world!",
    }


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ([chunk(0, 0, b"hellO"), chunk(2, 0, b"world!")], "a has 5 bytes with SHA-256"),
        ([chunk(0, 0, b"hello"), chunk(2, 0, b"world?")], "c has 6 bytes with SHA-256"),
        ([chunk(0, 0, b"hello"), chunk(2, 0, b"world!!")], "c has 7 bytes"),
        ([chunk(0, 0, b"hello")], "ended in c"),
        ([chunk(0, 0, b"hell")], "ended in a"),
        ([], "ended in a"),
        ([chunk(0, 1, b"ello")], "offset 1 of file 0, but offset 0 of file 0 is next"),
        ([chunk(2, 0, b"world!")], "offset 0 of file 2"),
        ([chunk(0, 0, b"")], "offset 0 of file 0"),
        ([chunk(0, 0, b"hello"), chunk(2, 0, b"world!"), chunk(3, 0, b"x")], "offset 0 of file 3"),
        ([chunk(-1, 0, b"x")], "file -1"),
    ],
)
def test_damaged_download_is_removed(tmp_path, version, items, text):
    with pytest.raises(errors.ModelDamaged, match=text):
        receive(tmp_path / "bundle", [header(version, "a", "b", "c"), *items])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "..", "../x", "/etc/passwd", "a/b", ".hidden", "a\0", "a" * 101, "ä"])
def test_file_name_that_is_a_path_is_refused(tmp_path, version, name):
    with pytest.raises(errors.ModelDamaged, match="is not a valid file name"):
        receive(tmp_path / "bundle", [header(version, name)])
    assert list(tmp_path.iterdir()) == []


def test_download_needs_exactly_one_header(tmp_path, version):
    for items in ([header(version, "a"), header(version, "b")], [header(version, "a", "a")]):
        with pytest.raises(errors.ModelDamaged, match="two headers or listed a file twice"):
            receive(tmp_path / "bundle", items)
    for items, text in (([chunk(0, 0, b"x")], "offset 0"), ([], "before its header")):
        with pytest.raises(errors.ModelDamaged, match=text):
            receive(tmp_path / "bundle", items)


def test_folder_created_during_download_is_kept(tmp_path, version):
    with ModelFolder(tmp_path / "bundle") as target:
        target.accept(header(version, "b"))
        target.accept(chunk(0, 0, b"hello"))
        (tmp_path / "bundle").mkdir()
        (tmp_path / "bundle" / "mine").touch()
        with pytest.raises(OSError, match="not empty"):
            target.finish()
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "mine"]
