"""Models in fp16: loaded where there is a GPU, else as fp32; translated with end to end, here on a CPU."""

import logging
import shutil

import onnxruntime
import pytest

from ferryman_service.bundle.manifest import EMBEDDING_FILE, FP16_FILES, SUBWORDS_FILE, graph_files, read_manifest, seal
from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.domain.translation import CancelToken, ComputeType, SearchOptions
from ferryman_service.translation.device_model import CudaFailed, cuda_is_available, open_session
from ferryman_service.translation.loader import OnnxBundleLoader, open_device_model
from ferryman_service.translation.onnx_model import CUDA, OnnxConfig
from ferryman_service.translation.scheduler import SchedulerConfig
from tests.fakes.random_model import random_sentences

FP16 = OnnxConfig(compute_type=ComputeType.FP16)
HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@pytest.fixture
def load():
    loaded = []

    def make(bundle, asked=None, config=FP16):
        loaded.append(OnnxBundleLoader(config, SchedulerConfig()).load(bundle, asked))
        return loaded[-1]

    yield make
    for engine in loaded:
        engine.close()


@pytest.fixture
def copied_bundle(bundle_dir, tmp_path):
    return shutil.copytree(bundle_dir, tmp_path / "copy")


def tokens_of(engine, options):
    translations, _ = engine.translate(random_sentences(30, seed=4), options, CancelToken())
    return [translation.hypotheses[0].tokens for translation in translations]


@pytest.mark.parametrize("options", [SearchOptions(beam_size=1), SearchOptions(beam_size=4)], ids=["greedy", "beam"])
def test_sixteen_bits_translate_almost_as_thirty_two(bundle_dir, load, options):
    found, wanted = (tokens_of(load(bundle_dir, asked), options) for asked in (None, ComputeType.FP32))
    equal = sum(one == other for one, other in zip(found, wanted, strict=True))
    assert equal >= 27, f"{equal} of 30"


def test_alignments_scores_and_logits_are_given_too(bundle_dir, load):
    options = SearchOptions(beam_size=2, return_alignment=True, return_token_scores=True, repetition_penalty=1.2)
    translations, _ = load(bundle_dir).translate(random_sentences(3, seed=5), options, CancelToken())
    for translation in translations:
        (hypothesis,) = translation.hypotheses
        assert len(hypothesis.alignment) == len(hypothesis.token_log_probabilities) == hypothesis.target_tokens


def test_memory_is_that_of_the_files_that_are_read(bundle_dir, load):
    names = (*FP16_FILES, EMBEDDING_FILE, SUBWORDS_FILE)
    assert load(bundle_dir).memory_bytes() == sum((bundle_dir / name).stat().st_size for name in names)


def test_a_bundle_without_fp16_is_loaded_as_fp32_on_the_cpu(copied_bundle, load, caplog):
    for name in FP16_FILES:
        (copied_bundle / name).unlink()
    seal(copied_bundle, read_manifest(copied_bundle).header)
    config = OnnxConfig(compute_type=ComputeType.FP16, device=CUDA, cuda_graphs=True)
    with caplog.at_level(logging.WARNING):
        found = tokens_of(load(copied_bundle, config=config), SearchOptions(beam_size=2))
    assert "no fp16 graphs" in caplog.text
    assert found == tokens_of(load(copied_bundle, ComputeType.FP32), SearchOptions(beam_size=2))


@pytest.mark.parametrize("name", FP16_FILES)
def test_a_damaged_file_is_refused_where_it_is_needed(copied_bundle, load, name):
    content = bytearray((copied_bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied_bundle / name).write_bytes(content)
    with pytest.raises(ModelDamaged, match=name.replace(".", r"\.")):
        load(copied_bundle)
    load(copied_bundle, ComputeType.FP32)


def test_graphs_in_each_others_place_are_refused(copied_bundle, load):
    header, files = read_manifest(copied_bundle).header, graph_files(ComputeType.FP16)
    encoder, decoder = copied_bundle / files.encoder, copied_bundle / files.decoder
    contents = encoder.read_bytes(), decoder.read_bytes()
    decoder.write_bytes(contents[0])
    encoder.write_bytes(contents[1])
    seal(copied_bundle, header)
    with pytest.raises(ModelDamaged, match="cannot be loaded"):
        load(copied_bundle)


def test_cuda_graphs_that_are_refused_are_done_without_and_it_is_said(caplog):
    asked = []

    def load(config):
        asked.append(config.cuda_graphs)
        if config.cuda_graphs:
            raise RuntimeError("a node is on the CPU")
        return "a model"

    config = OnnxConfig(compute_type=ComputeType.FP16, device=CUDA, cuda_graphs=True)
    with caplog.at_level(logging.WARNING):
        assert open_device_model(config, load) == "a model"
    assert asked == [True, False]
    assert "a node is on the CPU" in caplog.text


def test_cuda_graphs_that_fail_at_the_first_step_are_done_without(bundle_dir, caplog):
    asked = []

    def load(config):
        asked.append(config.cuda_graphs)
        return "no model, so that a step with it fails"

    config = OnnxConfig(compute_type=ComputeType.FP16, device=CUDA, cuda_graphs=True)
    with caplog.at_level(logging.WARNING):
        open_device_model(config, load)
    assert asked == [True, False]
    assert "CUDA graphs are refused" in caplog.text


@pytest.mark.skipif(HAS_CUDA, reason="CUDA is there")
def test_without_cuda_nothing_is_loaded_as_if_it_were_there(bundle_dir):
    assert not cuda_is_available()
    with pytest.raises(CudaFailed, match="could not start CUDA"):
        open_session(bundle_dir / FP16_FILES[0], OnnxConfig(compute_type=ComputeType.FP16, device=CUDA))
