"""Serving a bundle: each compute type needs its own files alone; what is damaged is refused, what is gone is said."""

import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ferryman_service.bundle.manifest import (
    CONTENT_FILES,
    EMBEDDING_FILE,
    EMBEDDING_INT8_FILE,
    INT8_FILES,
    MANIFEST_FILE,
    SUBWORDS_FILE,
    graph_files,
    read_manifest,
    seal,
)
from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.domain.translation import CancelToken, ComputeType, SearchOptions
from ferryman_service.translation.loader import OnnxBundleLoader
from ferryman_service.translation.onnx_model import OnnxConfig
from ferryman_service.translation.scheduler import SchedulerConfig
from tests.fakes.random_model import random_sentences

FP32, INT8 = ComputeType.FP32, ComputeType.INT8
OTHER = {FP32: INT8, INT8: FP32}
FILES = {FP32: CONTENT_FILES, INT8: (*INT8_FILES, SUBWORDS_FILE)}
OWN_FILES = [(compute_type, name) for compute_type in FILES for name in FILES[compute_type]]


@pytest.fixture
def load():
    """Loads a bundle; what was loaded is closed at the end."""
    loaded = []

    def make(bundle, asked=None, **config):
        loaded.append(OnnxBundleLoader(OnnxConfig(**config), SchedulerConfig()).load(bundle, asked))
        return loaded[-1]

    yield make
    for engine in loaded:
        engine.close()


@pytest.fixture
def copied_bundle(bundle_dir, tmp_path):
    return shutil.copytree(bundle_dir, tmp_path / "copy")


def tokens_of(engine, sentences=None):
    translations, _ = engine.translate(
        sentences or random_sentences(10, seed=4), SearchOptions(beam_size=2), CancelToken()
    )
    return [translation.hypotheses[0].tokens for translation in translations]


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("compute_type", "name"), OWN_FILES)
@pytest.mark.parametrize("harm", ["changed", "gone", "shorter"])
def test_a_damaged_file_is_refused_where_it_is_needed(copied_bundle, load, compute_type, name, harm):
    path = copied_bundle / name
    match harm:
        case "changed":
            damage(path)
        case "gone":
            path.unlink()
        case "shorter":
            path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelDamaged, match=name.replace(".", r"\.")) as caught:
        load(copied_bundle, compute_type)
    assert caught.value.metadata["file"] == name
    if name != SUBWORDS_FILE:
        assert tokens_of(load(copied_bundle, OTHER[compute_type]))


@pytest.mark.parametrize(("compute_type", "name"), OWN_FILES)
@pytest.mark.parametrize("content", [b"", b"this is no model"])
def test_a_file_that_was_published_broken_is_refused(copied_bundle, load, compute_type, name, content):
    header = read_manifest(copied_bundle).header
    (copied_bundle / name).write_bytes(content)
    seal(copied_bundle, header)
    with pytest.raises(ModelDamaged, match="cannot be loaded") as caught:
        load(copied_bundle, compute_type)
    assert str(copied_bundle) not in caught.value.message


@pytest.mark.parametrize(
    ("compute_type", "name", "dtype"), [(FP32, EMBEDDING_FILE, np.float32), (INT8, EMBEDDING_INT8_FILE, np.int8)]
)
def test_an_embedding_of_another_shape_or_type_is_refused(copied_bundle, load, compute_type, name, dtype):
    header = read_manifest(copied_bundle).header
    shape = header.architecture.vocabulary_size, header.architecture.d_model
    for array in (np.zeros((shape[0] - 1, shape[1]), dtype), np.zeros(shape, np.float64)):
        np.save(copied_bundle / name, array)
        seal(copied_bundle, header)
        with pytest.raises(ModelDamaged, match="cannot be loaded"):
            load(copied_bundle, compute_type)


@pytest.mark.parametrize("compute_type", FILES)
def test_graphs_in_each_others_place_are_refused(copied_bundle, load, compute_type):
    header, files = read_manifest(copied_bundle).header, graph_files(compute_type)
    shutil.copyfile(copied_bundle / files.encoder, copied_bundle / files.decoder)
    seal(copied_bundle, header)
    with pytest.raises(ModelDamaged, match="cannot be loaded"):
        load(copied_bundle, compute_type)


def test_a_bundle_without_int8_is_loaded_as_fp32_and_a_warning_says_so(copied_bundle, load, caplog):
    header = read_manifest(copied_bundle).header
    wanted = tokens_of(load(copied_bundle, FP32))
    for name in INT8_FILES:
        (copied_bundle / name).unlink()
    seal(copied_bundle, header)
    with caplog.at_level(logging.WARNING):
        engine = load(copied_bundle, INT8)
    assert tokens_of(engine) == wanted
    [record] = caplog.records
    assert header.lineage.run_id in record.getMessage()
    assert "int8" in record.getMessage()


def test_the_configs_compute_type_holds_where_nobody_asks(bundle_dir, load):
    sizes = [load(bundle_dir, asked, compute_type=INT8).memory_bytes() for asked in (None, FP32)]
    manifest = read_manifest(bundle_dir)
    assert sizes == [manifest.size_bytes(INT8), manifest.size_bytes(FP32)]


@pytest.mark.parametrize("compute_type", FILES)
def test_memory_is_that_of_the_files_that_are_read(bundle_dir, load, compute_type):
    size_bytes = sum((bundle_dir / name).stat().st_size for name in FILES[compute_type])
    assert load(bundle_dir, compute_type).memory_bytes() == size_bytes


@pytest.mark.parametrize("compute_type", FILES)
def test_the_files_may_be_deleted_once_the_model_is_loaded(copied_bundle, load, compute_type):
    engine = load(copied_bundle, compute_type)
    wanted = tokens_of(engine)
    shutil.rmtree(copied_bundle)
    assert tokens_of(engine) == wanted
    assert tokens_of(engine, random_sentences(40, seed=5))


def test_a_bundle_of_an_older_format_is_refused_with_the_cure(copied_bundle, load):
    path = copied_bundle / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(ModelDamaged, match=r"format version 2.*train the model again"):
        load(copied_bundle)


@pytest.mark.parametrize("compute_type", FILES)
def test_serving_imports_nothing_of_training(bundle_dir, compute_type):
    program = f"""
import sys
from pathlib import Path
from ferryman_service.domain.translation import CancelToken, ComputeType, SearchOptions
from ferryman_service.translation.loader import OnnxBundleLoader
from ferryman_service.translation.onnx_model import OnnxConfig
from ferryman_service.translation.scheduler import SchedulerConfig
loader = OnnxBundleLoader(OnnxConfig(), SchedulerConfig())
engine = loader.load(Path({str(bundle_dir)!r}), ComputeType({str(compute_type)!r}))
engine.warm_up()
engine.translate(["ba de"], SearchOptions(return_alignment=True, return_token_scores=True), CancelToken())
engine.close()
sys.exit(", ".join({{"torch", "onnx", "safetensors", "sacrebleu"}} & set(sys.modules)) or 0)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
