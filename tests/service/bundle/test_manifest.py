"""A bundle's manifest: written, read, checked; every kind of damage is named."""

import dataclasses
import hashlib
import json

import pytest

from ferryman_service.bundle import manifest as bundles
from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.domain.models import Int8Outcome, Int8Scores, ModelLineage, ModelScores, PublishedWeights
from ferryman_service.domain.recipe import resolve_recipe
from ferryman_service.domain.translation import ComputeType


@pytest.fixture
def header():
    return bundles.ManifestHeader(
        lineage=ModelLineage(
            run_id="run_0000000000000000000000",
            corpus_id="cor_0000000000000000000000",
            corpus_digest="ab" * 32,
            source_language="en",
            target_language="de",
            recipe=resolve_recipe({"seed": 7}),
        ),
        scores=ModelScores(bleu=35.5, chrf=60.25, nll_per_token=1.125, weights=PublishedWeights.AVERAGE, step=900),
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


@pytest.fixture
def int8_bundle(bundle, header):
    """The same with int8 files and weights."""
    for name in (*bundles.INT8_FILES, bundles.WEIGHTS_FILE):
        (bundle / name).write_bytes(f"content of {name}".encode())
    bundles.seal(bundle, header)
    return bundle


def edit_manifest(bundle, change):
    path = bundle / bundles.MANIFEST_FILE
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_sealed_bundle_is_read_and_verified(bundle, header):
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


@pytest.mark.parametrize("version", [1, 2, 99, "3", None])
def test_another_format_version_says_what_to_do(bundle, version):
    edit_manifest(bundle, lambda values: values.update(format_version=version))
    with pytest.raises(ModelDamaged, match=f"format version {version!r}, this server reads 4: .*train the model again"):
        bundles.read_manifest(bundle)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_json_that_is_no_object_is_damage(bundle, content):
    (bundle / bundles.MANIFEST_FILE).write_text(content)
    with pytest.raises(ModelDamaged):
        bundles.verify(bundle)


def test_sealing_needs_every_file(tmp_path, header):
    with pytest.raises(FileNotFoundError):
        bundles.seal(tmp_path, header)


def test_optional_files_are_all_present_or_all_absent(int8_bundle, header):
    manifest = bundles.verify(int8_bundle)
    assert set(manifest.files) == {*bundles.CONTENT_FILES, *bundles.INT8_FILES, bundles.WEIGHTS_FILE}
    for name in bundles.INT8_FILES:
        (int8_bundle / name).rename(int8_bundle / "aside")
        bundles.seal(int8_bundle, header)
        with pytest.raises(ModelDamaged, match="names"):
            bundles.read_manifest(int8_bundle)
        (int8_bundle / "aside").rename(int8_bundle / name)


def test_int8_is_there_if_its_files_are(bundle, header):
    assert not bundles.read_manifest(bundle).has_int8
    for name in bundles.INT8_FILES:
        (bundle / name).write_bytes(b"x")
    assert bundles.seal(bundle, header).has_int8


@pytest.mark.parametrize(
    ("compute_type", "needed"),
    [
        (ComputeType.FP32, set(bundles.CONTENT_FILES)),
        (ComputeType.INT8, {*bundles.INT8_FILES, bundles.SUBWORDS_FILE}),
    ],
)
def test_a_compute_type_needs_its_own_files_alone(int8_bundle, compute_type, needed):
    manifest = bundles.read_manifest(int8_bundle)
    assert manifest.size_bytes(compute_type) == sum((int8_bundle / name).stat().st_size for name in needed)
    for name in manifest.files:
        path = int8_bundle / name
        content = path.read_bytes()
        path.write_bytes(b"y" * len(content))
        if name in needed:
            with pytest.raises(ModelDamaged, match=name):
                bundles.verify(int8_bundle, to_translate=compute_type)
        else:
            bundles.verify(int8_bundle, to_translate=compute_type)
            with pytest.raises(ModelDamaged, match=name):
                bundles.verify(int8_bundle)
        path.write_bytes(content)


@pytest.mark.parametrize("keep", [True, False])
def test_settling_int8_changes_nothing_else(int8_bundle, header, keep):
    scores = Int8Scores(pairs=1000, fp32_bleu=34.5, int8_bleu=34.25)
    assert bundles.settle_int8(int8_bundle, scores, keep=keep) == bundles.verify(int8_bundle)
    manifest = bundles.verify(int8_bundle)
    assert (manifest.header.int8, manifest.has_int8) == (scores, keep)
    assert dataclasses.replace(manifest.header, int8=None) == header
    assert bundles.WEIGHTS_FILE in manifest.files
    assert {path.name for path in int8_bundle.iterdir()} == {*manifest.files, bundles.MANIFEST_FILE}
    bundles.settle_int8(int8_bundle, scores, keep=keep)  # a second time does no harm


def test_missing_measurement_is_kept(int8_bundle):
    assert bundles.read_manifest(int8_bundle).int8 is None
    bundles.settle_int8(int8_bundle, Int8Scores(pairs=0), keep=True)
    assert bundles.read_manifest(int8_bundle).int8 == Int8Outcome(scores=Int8Scores(pairs=0), kept=True)


def test_every_compute_type_has_graphs_of_its_own():
    names = [name for one in ComputeType for name in vars(bundles.graph_files(one)).values()]
    assert len(set(names)) == len(names)


@pytest.fixture
def fp16_bundle(bundle, header):
    """A bundle with fp16 files alone."""
    for name in bundles.FP16_FILES:
        (bundle / name).write_bytes(f"content of {name}".encode())
    bundles.seal(bundle, header)
    return bundle


def test_translating_on_a_gpu_needs_the_embedding_too(fp16_bundle):
    manifest = bundles.read_manifest(fp16_bundle)
    assert (manifest.has_fp16, manifest.has_int8) == (True, False)
    (fp16_bundle / bundles.DECODER_FILE).write_bytes(b"is not read")
    bundles.verify(fp16_bundle, to_translate=ComputeType.FP16)
    for name in (*bundles.FP16_FILES, bundles.EMBEDDING_FILE, bundles.SUBWORDS_FILE):
        content = (fp16_bundle / name).read_bytes()
        (fp16_bundle / name).write_bytes(b"other")
        with pytest.raises(ModelDamaged, match=name):
            bundles.verify(fp16_bundle, to_translate=ComputeType.FP16)
        (fp16_bundle / name).write_bytes(content)


@pytest.mark.parametrize("name", bundles.FP16_FILES)
def test_a_part_of_the_fp16_files_is_no_bundle(fp16_bundle, name):
    edit_manifest(fp16_bundle, lambda values: values["files"].pop(name))
    with pytest.raises(ModelDamaged, match="names"):
        bundles.read_manifest(fp16_bundle)
