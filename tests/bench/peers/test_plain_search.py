"""The plain loop's model behind the search: prefixes that are computed anew give what the whole sentence gives."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.peers.plain_loop import PlainTransformer, padded
from bench.peers.plain_search import PlainDecoder
from bench.peers.task import PeerTask
from ferryman_service.domain.tokens import BOS, EOS, UNK
from ferryman_service.domain.translation import SearchOptions
from ferryman_service.search.beam import search
from ferryman_service.search.sentence import SentenceSearch

VOCABULARY = 7
SOURCES = [[4, 5, 6, EOS], [6, EOS], [5, 4, EOS]]


@pytest.fixture(params=[False, True], ids=["post-norm", "pre-norm"])
def model(request):
    torch.manual_seed(5)
    task = PeerTask(
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        heads=2,
        ffn_dim=32,
        dropout=0.5,
        vocabulary=VOCABULARY,
        label_smoothing=0.0,
        clip_norm=0.0,
        max_tokens=100,
        norm_first=request.param,
    )
    model = PlainTransformer(task).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(3.0)  # probabilities that differ
    return model


@torch.no_grad()
def log_probability(model, source, target):
    """Return that of a whole target sentence, as in training: each token after the ones before it."""
    log_probs_TV = model(torch.tensor([source]), torch.tensor([[BOS, *target[:-1]]]))[0].log_softmax(dim=-1)
    return float(log_probs_TV[torch.arange(len(target)), torch.tensor(target)].sum())


def test_steps_give_the_logits_of_the_whole_prefix(model):
    batch = PlainDecoder(model).batch(2)
    batch.admit(SOURCES)
    batch.step_logits(np.full((3, 2), BOS), np.array([[0, 1]] * 3))
    batch.step_logits(np.array([[4, 5]] * 3), np.array([[0, 0]] * 3))
    batch.keep(np.array([0, 2]))
    logits_SWV = batch.step_logits(np.array([[6, 4]] * 2), np.array([[1, 0]] * 2))
    assert batch.sentences == 2
    for number, source in enumerate((SOURCES[0], SOURCES[2])):
        for row, prefix in enumerate(([BOS, 5, 6], [BOS, 4, 4])):
            with torch.no_grad():
                expected_TV = model(padded([source]), torch.tensor([prefix]))[0]
            np.testing.assert_allclose(logits_SWV[number, row], expected_TV[-1], atol=1e-4)


def test_candidates_are_the_best_by_log_probability(model):
    batch = PlainDecoder(model).batch(1)
    batch.admit(SOURCES)
    found = batch.step(np.full((3, 1), BOS), np.zeros((3, 1), dtype=np.int64), k=3)
    for number, source in enumerate(SOURCES):
        with torch.no_grad():
            logits_V = model(padded([source]), torch.tensor([[BOS]]))[0, -1]
        values, tokens = F.log_softmax(logits_V, dim=-1).topk(3)
        assert found.tokens_SWK[number, 0].tolist() == tokens.tolist()
        np.testing.assert_allclose(found.log_probs_SWK[number, 0], values, atol=1e-5)


def test_wide_beam_finds_the_best_of_all_sentences(model):
    words, longest = [UNK, 4, 5, 6], 3
    endings = [[*body, EOS] for length in range(longest) for body in itertools.product(words, repeat=length)]
    options = SearchOptions(beam_size=32, length_penalty=1.0)
    searches = [SentenceSearch(options=options, max_length=longest) for _ in SOURCES]
    found = search(PlainDecoder(model), SOURCES, searches, lambda: None)
    for source, hypotheses in zip(SOURCES, found, strict=True):
        best = max(endings, key=lambda target: log_probability(model, source, target) / len(target))
        assert [*hypotheses[0].tokens, EOS] == best
        assert hypotheses[0].log_probability == pytest.approx(log_probability(model, source, best), abs=1e-4)
