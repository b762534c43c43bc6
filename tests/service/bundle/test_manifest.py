"""A bundle's manifest: written, read, checked; every kind of damage is named."""

import hashlib
import json

import pytest

from ferryman_service.bundle import manifest as bundles
from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.domain.models import ModelLineage, ModelScores
from ferryman_service.domain.recipe import resolve_recipe


@pytest.fixture
def header():
    return bundles.ManifestHeader(
        lineage=ModelLineage(
            run_id="run_1",
            corpus_id="cor_1",
            corpus_digest="ab" * 32,
            source_language="en",
            target_language="de",
            recipe=resolve_recipe({"seed": 7}),
        ),
        scores=ModelScores(bleu=35.5, chrf=60.25, nll_per_token=1.125, weights="average", step=900),
        parameters=12345,
        max_sentence_tokens=256,
        architecture=bundles.Architecture(d_model=128, decoder_layers=4, heads=4, vocabulary_size=8000),
    )


@pytest.fixture
def bundle(tmp_path, header):
    for name in bundles.CONTENT_FILES:
        (tmp_path / name).write_bytes(f"content of {name}".encode())
    bundles.seal(tmp_path, header)
    return tmp_path


def edit_manifest(bundle, change):
    path = bundle / bundles.MANIFEST_FILE
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_what_was_sealed_is_read_and_verified(bundle, header):
    manifest = bundles.read_manifest(bundle)
    assert manifest.header == header
    assert manifest.format_version == bundles.FORMAT_VERSION
    assert bundles.verify(bundle) == manifest
    encoder = (bundle / bundles.ENCODER_FILE).read_bytes()
    assert manifest.files[bundles.ENCODER_FILE].sha256 == hashlib.sha256(encoder).hexdigest()


def test_digest_and_size_cover_the_manifest(bundle):
    content = (bundle / bundles.MANIFEST_FILE).read_bytes()
    assert bundles.manifest_digest(bundle) == hashlib.sha256(content).hexdigest()
    assert bundles.bundle_size_bytes(bundle) == sum(path.stat().st_size for path in bundle.iterdir())


def test_the_same_content_gives_the_same_manifest(bundle, header):
    before = bundles.manifest_digest(bundle)
    bundles.seal(bundle, header)
    assert bundles.manifest_digest(bundle) == before


@pytest.mark.parametrize("name", bundles.CONTENT_FILES)
def test_a_changed_file_is_damage(bundle, name):
    content = bytearray((bundle / name).read_bytes())
    content[3] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(ModelDamaged, match=name) as caught:
        bundles.verify(bundle)
    assert caught.value.metadata["file"] == name


@pytest.mark.parametrize("name", [*bundles.CONTENT_FILES, bundles.MANIFEST_FILE])
def test_a_missing_file_is_damage(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(ModelDamaged, match=name):
        bundles.verify(bundle)


def test_a_truncated_manifest_is_damage(bundle):
    path = bundle / bundles.MANIFEST_FILE
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelDamaged, match="not a manifest"):
        bundles.read_manifest(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("header"),
        lambda values: values["header"].pop("scores"),
        lambda values: values["header"]["architecture"].update(surprise=1),
        lambda values: values["files"].update({"encoder.onnx": 3}),
        lambda values: values["header"]["lineage"]["recipe"].update(preset="none such"),
    ],
)
def test_a_manifest_of_another_shape_is_damage(bundle, change):
    edit_manifest(bundle, change)
    with pytest.raises(ModelDamaged, match="not a manifest"):
        bundles.read_manifest(bundle)


@pytest.mark.parametrize("name", ["../../etc/passwd", "extra.bin"])
def test_a_manifest_names_no_other_files(bundle, name):
    edit_manifest(bundle, lambda values: values["files"].update({name: values["files"]["encoder.onnx"]}))
    with pytest.raises(ModelDamaged, match="names"):
        bundles.read_manifest(bundle)


def test_another_format_version_says_what_to_do(bundle):
    edit_manifest(bundle, lambda values: values.update(format_version=99))
    with pytest.raises(ModelDamaged, match="format version 99"):
        bundles.read_manifest(bundle)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_json_that_is_no_object_is_damage(bundle, content):
    (bundle / bundles.MANIFEST_FILE).write_text(content)
    with pytest.raises(ModelDamaged):
        bundles.verify(bundle)


def test_sealing_needs_every_file(tmp_path, header):
    with pytest.raises(FileNotFoundError):
        bundles.seal(tmp_path, header)
