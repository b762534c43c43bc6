"""An exported bundle translates as the trained network does."""

import contextlib
import dataclasses
import shutil

import pytest

from ferryman_service.bundle.manifest import (
    CONTENT_FILES,
    FP16_FILES,
    INT8_FILES,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    read_manifest,
    verify,
)
from ferryman_service.domain.models import Int8Scores
from ferryman_service.domain.recipe import Activation, NormPlacement, Positions
from ferryman_service.domain.translation import CancelToken, ComputeType, SearchOptions
from ferryman_service.training.export import OnnxExporter, calibrate, load_transformer
from ferryman_service.translation.loader import OnnxBundleLoader
from ferryman_service.translation.onnx_model import OnnxConfig
from ferryman_service.translation.scheduler import SchedulerConfig
from tests.fakes.random_model import random_sentences, random_trained_model, small_recipe, some_lineage


def load(bundle, compute_type=ComputeType.FP32):
    return contextlib.closing(OnnxBundleLoader(OnnxConfig(), SchedulerConfig()).load(bundle, compute_type))


def export(trained, bundle):
    bundle.mkdir()
    OnnxExporter().export(trained, some_lineage(trained.recipe), bundle)
    return bundle


def tokens_of(translator, sentences, options):
    translations, _ = translator.translate(sentences, options, CancelToken())
    return [[hypothesis.tokens for hypothesis in translation.hypotheses] for translation in translations]


def test_the_bundle_is_whole(bundle_dir, trained_model):
    wanted = {*CONTENT_FILES, *INT8_FILES, *FP16_FILES, WEIGHTS_FILE, MANIFEST_FILE}
    assert {path.name for path in bundle_dir.iterdir()} == wanted
    manifest = verify(bundle_dir)
    header = manifest.header
    assert manifest.has_int8
    assert manifest.has_fp16
    assert header.int8 is None, "nobody has measured it yet"
    assert header.scores == trained_model.scores
    assert header.lineage == some_lineage(trained_model.recipe)
    assert header.max_sentence_tokens == trained_model.recipe.data.max_sentence_tokens
    assert header.architecture.vocabulary_size == load_transformer(trained_model).config.vocabulary_size


@pytest.mark.parametrize("options", [SearchOptions(beam_size=1), SearchOptions(beam_size=5, n_best=3)])
def test_translates_token_for_token_as_the_network(bundle_dir, trained_model, options):
    sentences = random_sentences(60, seed=3)
    with load(bundle_dir) as exported:
        found = tokens_of(exported, sentences, options)
    assert found == tokens_of(OnnxExporter().reference(trained_model), sentences, options)
    assert len({tokens[0] for tokens in found}) > 20  # the translations are not all the same


@pytest.mark.parametrize(
    "model",
    [
        {"norm": NormPlacement.DEEP, "activation": Activation.GELU},
        {
            "norm": NormPlacement.PRE,
            "activation": Activation.SWIGLU,
            "positions": Positions.ROPE,
            "encoder_layers": 12,
            "d_model": 16,
            "heads": 2,
        },
        {"d_model": 36, "heads": 3, "positions": Positions.ROPE},
    ],
    ids=["deep, gelu", "pre 12+2, swiglu, rope", "heads of 12"],
)
def test_every_kind_of_network_is_exported(tmp_path, model):
    recipe = small_recipe(**model)
    trained = random_trained_model(tmp_path, recipe)
    bundle = export(trained, tmp_path / "bundle")
    sentences, options = random_sentences(20, seed=3), SearchOptions(beam_size=2)
    with load(bundle) as exported:
        found = tokens_of(exported, sentences, options)
    assert found == tokens_of(OnnxExporter().reference(trained), sentences, options)
    assert len({tokens[0] for tokens in found}) > 5  # the translations are not all the same


def test_pre_norm_and_long_sentences(tmp_path):
    """Sentences beyond the first table of positions, and the final norms of pre-norm networks."""
    recipe = small_recipe(norm=NormPlacement.PRE, decoder_layers=1)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, max_sentence_tokens=700))
    trained = random_trained_model(tmp_path, recipe)
    bundle = export(trained, tmp_path / "bundle")
    sentences = [" ".join(["ba"] * 600), "ka le"]
    options = SearchOptions(beam_size=2, max_length=40)
    with load(bundle) as exported:
        translations, _ = exported.translate(sentences, options, CancelToken())
    assert translations[0].source_tokens > 512
    reference, _ = OnnxExporter().reference(trained).translate(sentences, options, CancelToken())
    for ours, theirs in zip(translations, reference, strict=True):
        assert ours.hypotheses[0].tokens == theirs.hypotheses[0].tokens
        assert ours.hypotheses[0].score == pytest.approx(theirs.hypotheses[0].score, abs=1e-4)


def test_the_same_weights_make_the_same_bundle_to_the_last_byte(trained_model, bundle_dir, tmp_path):
    again = export(trained_model, tmp_path / "again")
    for path in bundle_dir.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_int8_is_about_a_quarter_of_the_size(bundle_dir):
    manifest = read_manifest(bundle_dir)
    weights = ("decoder.onnx", "encoder.onnx", "embedding.npy")
    fp32, int8 = (
        sum(manifest.files[name].size_bytes for name in names)
        for names in (weights, ("decoder.int8.onnx", "encoder.int8.onnx", "embedding.int8.npy"))
    )
    assert int8 < 0.5 * fp32  # a small model: what is no weight counts too


def test_the_reference_and_int8_agree_mostly(bundle_dir, trained_model):
    sentences, options = random_sentences(60, seed=3), SearchOptions(beam_size=1)
    with load(bundle_dir, ComputeType.INT8) as int8:
        found = tokens_of(int8, sentences, options)
    wanted = tokens_of(OnnxExporter().reference(trained_model), sentences, options)
    assert sum(one == other for one, other in zip(found, wanted, strict=True)) > 30


@pytest.mark.parametrize("keep", [True, False])
def test_int8_scores_are_recorded_and_int8_files_may_be_dropped(bundle_dir, tmp_path, keep):
    bundle = shutil.copytree(bundle_dir, tmp_path / "copy")
    scores = Int8Scores(pairs=7, fp32_bleu=30.5, int8_bleu=30.25)
    OnnxExporter().settle_int8(bundle, scores, keep=keep)
    manifest = verify(bundle)
    assert (manifest.header.int8, manifest.has_int8) == (scores, keep)
    assert dataclasses.replace(manifest.header, int8=None) == read_manifest(bundle_dir).header
    assert [(bundle / name).exists() for name in INT8_FILES] == [keep] * len(INT8_FILES)


def test_bleu_is_sacrebleus():
    lines = ["the ferry leaves at ten today .", "it is late ."]
    assert OnnxExporter().bleu(lines, lines, "en") == pytest.approx(100.0)
    assert OnnxExporter().bleu(["nothing of it all here", "no"], lines, "en") < 10.0


@pytest.mark.parametrize("sentences", [(), ("", " "), ("ba",)])
def test_ranges_are_measured_whatever_sentences_there_are(trained_model, sentences):
    trained = dataclasses.replace(trained_model, check_sentences=sentences)
    ranges = calibrate(load_transformer(trained), trained)
    assert len(ranges) == 1 * 4 + 2 * 7 + 1
    assert all(value > 0 for value in ranges.values())


def test_ranges_are_those_of_sentences_as_serving_takes_them(trained_model):
    """White space and the form of characters do not count, and what is too long for the model is left out."""
    plain = dataclasses.replace(trained_model, check_sentences=("ba de fi", "ka le"))
    strange = dataclasses.replace(trained_model, check_sentences=("  ba \t de fi\n", "ka\u00a0le ", "ba " * 500, " "))
    network = load_transformer(trained_model)
    assert calibrate(network, plain) == calibrate(network, strange)
