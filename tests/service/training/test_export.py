"""An exported bundle translates as the trained network does."""

import dataclasses

import numpy as np
import onnx
import pytest

from ferryman_service.bundle.manifest import (
    CONTENT_FILES,
    DECODER_FILE,
    ENCODER_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    verify,
)
from ferryman_service.domain.recipe import Activation, NormPlacement, Positions
from ferryman_service.domain.tokens import BOS, EOS
from ferryman_service.domain.translation import CancelToken, SearchOptions
from ferryman_service.model.session import TorchDecoder
from ferryman_service.pipeline.translator import MicroBatchLimit
from ferryman_service.training.export import OPSET_VERSION, PRODUCER, OnnxExporter, load_transformer
from ferryman_service.translation.loader import OnnxBundleLoader
from ferryman_service.translation.onnx_decoder import OnnxConfig, OnnxDecoder
from tests.fakes.random_model import random_sentences, random_trained_model, small_recipe, some_lineage


def load(bundle):
    return OnnxBundleLoader(OnnxConfig(), MicroBatchLimit()).load(bundle)


def tokens_of(translator, sentences, options):
    translations, _ = translator.translate(sentences, options, CancelToken())
    return [[hypothesis.tokens for hypothesis in translation.hypotheses] for translation in translations]


def test_the_bundle_is_whole(bundle_dir, trained_model):
    assert {path.name for path in bundle_dir.iterdir()} == {*CONTENT_FILES, WEIGHTS_FILE, MANIFEST_FILE}
    header = verify(bundle_dir).header
    assert header.scores == trained_model.scores
    assert header.lineage == some_lineage(trained_model.recipe)
    assert header.max_sentence_tokens == trained_model.recipe.data.max_sentence_tokens
    assert header.architecture.vocabulary_size == load_transformer(trained_model).config.vocabulary_size


def test_the_graphs_say_who_made_them_and_nothing_else(bundle_dir):
    for name in (ENCODER_FILE, DECODER_FILE):
        model = onnx.load(bundle_dir / name)
        onnx.checker.check_model(model, full_check=True)
        assert model.producer_name == PRODUCER
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET_VERSION)]
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_the_embedding_is_stored_once(bundle_dir, trained_model):
    transformer = load_transformer(trained_model)
    numbers = transformer.embedding.weight.numel()
    model = onnx.load(bundle_dir / DECODER_FILE)
    assert [np.prod(weight.dims) for weight in model.graph.initializer].count(numbers) == 1


@pytest.mark.parametrize("options", [SearchOptions(beam_size=1), SearchOptions(beam_size=5, n_best=3)])
def test_translates_token_for_token_as_the_network(bundle_dir, trained_model, options):
    sentences = random_sentences(60, seed=3)
    found = tokens_of(load(bundle_dir), sentences, options)
    assert found == tokens_of(OnnxExporter().reference(trained_model), sentences, options)
    assert len({tokens[0] for tokens in found}) > 20  # the translations are not all the same


def test_every_step_gives_the_networks_numbers(bundle_dir, trained_model):
    assert_steps_are_equal(bundle_dir, trained_model)


def assert_steps_are_equal(bundle_dir, trained_model):
    architecture = verify(bundle_dir).header.architecture
    sources = [[5, 6, 7, 8, 9, EOS], [10, 11, EOS], [12, EOS]]
    sessions = [
        OnnxDecoder.load(bundle_dir, architecture, OnnxConfig()).encode(sources),
        TorchDecoder(load_transformer(trained_model)).encode(sources),
    ]
    parents_of_steps = [[0, 1, 2], [0, 0, 1, 1, 2, 2], [1, 1, 5, 4], [3, 0][::-1], [0, 0, 1, 1]]
    for step, parents in enumerate(parents_of_steps):
        tokens = np.full(len(parents), BOS) if step == 0 else np.arange(20, 20 + len(parents)) + step
        ours, theirs = (session.step(tokens, np.array(parents), 12) for session in sessions)
        np.testing.assert_allclose(ours.log_probs_RK, theirs.log_probs_RK, atol=1e-4)
        np.testing.assert_array_equal(ours.tokens_RK, theirs.tokens_RK)
        assert ours.tokens_RK.shape == (len(parents), 12)
        assert ours.log_probs_RK.dtype == np.float32
        assert ours.tokens_RK.dtype == np.int64


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
    ],
    ids=["deep, gelu", "pre 12+2, swiglu, rope"],
)
def test_every_kind_of_network_is_exported(tmp_path, model):
    recipe = small_recipe(**model)
    trained = random_trained_model(tmp_path, recipe)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    OnnxExporter().export(trained, some_lineage(recipe), bundle)
    assert_steps_are_equal(bundle, trained)
    sentences, options = random_sentences(20, seed=3), SearchOptions(beam_size=2)
    found = tokens_of(load(bundle), sentences, options)
    assert found == tokens_of(OnnxExporter().reference(trained), sentences, options)
    assert len({tokens[0] for tokens in found}) > 5  # the translations are not all the same


def test_pre_norm_and_long_sentences(tmp_path):
    """Sentences beyond the first table of positions, and the final norms of pre-norm networks."""
    recipe = small_recipe(norm=NormPlacement.PRE, decoder_layers=1)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, max_sentence_tokens=700))
    trained = random_trained_model(tmp_path, recipe)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    OnnxExporter().export(trained, some_lineage(recipe), bundle)
    sentences = [" ".join(["ba"] * 600), "ka le"]
    options = SearchOptions(beam_size=2, max_length=40)
    translations, _ = load(bundle).translate(sentences, options, CancelToken())
    assert translations[0].source_tokens > 512
    reference, _ = OnnxExporter().reference(trained).translate(sentences, options, CancelToken())
    for ours, theirs in zip(translations, reference, strict=True):
        assert ours.hypotheses[0].tokens == theirs.hypotheses[0].tokens
        assert ours.hypotheses[0].score == pytest.approx(theirs.hypotheses[0].score, abs=1e-4)
