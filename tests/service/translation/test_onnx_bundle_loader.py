"""Serving a bundle: loaded or refused, and every sentence translated as if it were alone."""

import random
import subprocess
import sys
import threading

import onnxruntime
import pytest

from ferryman_service.bundle.manifest import DECODER_FILE, SUBWORDS_FILE, read_manifest, seal
from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.domain.translation import CancelToken, SearchOptions
from ferryman_service.pipeline.translator import MicroBatchLimit
from ferryman_service.translation.loader import OnnxBundleLoader
from ferryman_service.translation.onnx_decoder import OnnxConfig
from tests.fakes.random_model import random_sentences


def load(bundle, **limit):
    return OnnxBundleLoader(OnnxConfig(), MicroBatchLimit(**limit)).load(bundle)


@pytest.fixture(scope="module")
def translator(bundle_dir):
    return load(bundle_dir)


@pytest.fixture
def copied_bundle(bundle_dir, tmp_path):
    for path in bundle_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def texts(translator, sentences, options):
    translations, _ = translator.translate(sentences, options, CancelToken())
    return [[hypothesis.text for hypothesis in translation.hypotheses] for translation in translations]


@pytest.mark.parametrize("options", [SearchOptions(beam_size=1), SearchOptions(beam_size=4, n_best=4)])
def test_a_sentence_does_not_depend_on_its_neighbours(translator, options):
    sentences = random_sentences(40, seed=11)
    alone = {sentence: texts(translator, [sentence], options)[0] for sentence in sentences}
    generator = random.Random(5)
    for size in (2, 7, 40, 100):
        batch = generator.choices(sentences, k=size)
        assert texts(translator, batch, options) == [alone[sentence] for sentence in batch]


def test_micro_batches_change_nothing(bundle_dir, translator):
    sentences, options = random_sentences(30, seed=12), SearchOptions(beam_size=3)
    for max_positions in (1, 300, 2000):
        assert texts(load(bundle_dir, max_positions=max_positions), sentences, options) == texts(
            translator, sentences, options
        )


def test_several_threads_at_once(translator):
    sentences, options = random_sentences(12, seed=13), SearchOptions(beam_size=2)
    expected = texts(translator, sentences, options)
    found = {}

    def work(number):
        found[number] = texts(translator, sentences, options)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[number] == expected for number in range(4))


def test_a_changed_file_is_refused(copied_bundle):
    path = copied_bundle / DECODER_FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelDamaged, match=DECODER_FILE):
        load(copied_bundle)


@pytest.mark.parametrize("name", [DECODER_FILE, SUBWORDS_FILE])
@pytest.mark.parametrize("content", [b"", b"this is no model"])
def test_a_file_that_was_published_broken_is_refused(copied_bundle, name, content):
    header = read_manifest(copied_bundle).header
    (copied_bundle / name).write_bytes(content)
    seal(copied_bundle, header)
    with pytest.raises(ModelDamaged, match="cannot be loaded") as caught:
        load(copied_bundle)
    assert str(copied_bundle) not in caught.value.message


def test_cuda_that_is_not_there_is_said(bundle_dir):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is there")
    with pytest.raises(ValueError, match="onnxruntime-gpu"):
        OnnxBundleLoader(OnnxConfig(cuda=True), MicroBatchLimit()).load(bundle_dir)


def test_serving_imports_no_torch(bundle_dir):
    program = f"""
import sys
from pathlib import Path
from ferryman_service.domain.translation import CancelToken, SearchOptions
from ferryman_service.pipeline.translator import MicroBatchLimit
from ferryman_service.translation.loader import OnnxBundleLoader
from ferryman_service.translation.onnx_decoder import OnnxConfig
translator = OnnxBundleLoader(OnnxConfig(), MicroBatchLimit()).load(Path({str(bundle_dir)!r}))
translator.translate(["the ferry"], SearchOptions(), CancelToken())
sys.exit(", ".join({{"torch", "onnx", "safetensors", "sacrebleu"}} & set(sys.modules)) or 0)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
