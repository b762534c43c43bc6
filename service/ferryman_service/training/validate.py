"""Validation: the loss on held-out pairs, and BLEU and chrF of their translations.

Shape suffixes: B sentences of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from ferryman_service.domain.recipe import Recipe
from ferryman_service.model.session import TorchDecoder
from ferryman_service.model.transformer import Transformer
from ferryman_service.search.beam import BeamOptions, search
from ferryman_service.text.subwords import Subwords
from ferryman_service.training.batches import make_batch
from ferryman_service.training.data import ValidationPairs
from ferryman_service.training.packing import batches_by_length
from ferryman_service.training.scores import ValidationScores
from ferryman_service.training.step import batch_losses

_GREEDY: Final = BeamOptions(beam_size=1, n_best=1, length_penalty=1.0)
_LOSS_BATCH_TARGET_TOKENS: Final = 4096
_TRANSLATION_BATCH_SENTENCES: Final = 64


class Validator:
    """Scores weights on the validation pairs of a corpus."""

    def __init__(
        self,
        pairs: ValidationPairs,
        subwords: Subwords,
        recipe: Recipe,
        device: torch.device,
        check: Callable[[], None],
    ) -> None:
        self._pairs = pairs
        self._subwords = subwords
        self._recipe = recipe
        self._device = device
        self._check = check

    def score(self, model: Transformer) -> ValidationScores:
        """Return the model's scores; leaves it in the mode in which it came. Raises what `check` raises."""
        was_training = model.training
        model.eval()
        try:
            loss, nll_per_token = self._losses(model)
            translations = self._translate(model)
        finally:
            model.train(was_training)
        references = [self._pairs.references[: len(translations)]]
        return ValidationScores(
            loss=loss,
            nll_per_token=nll_per_token,
            bleu=BLEU().corpus_score(translations, references).score,
            chrf=CHRF().corpus_score(translations, references).score,
            translated_pairs=len(translations),
        )

    @torch.inference_mode()
    def _losses(self, model: Transformer) -> tuple[float, float]:
        tokens = self._pairs.tokens
        lengths = tokens.source.lengths_P, tokens.target.lengths_P
        loss_sum = nll_sum = 0.0
        for index_B in batches_by_length(*lengths, _LOSS_BATCH_TARGET_TOKENS):
            self._check()
            batch = make_batch(tokens, index_B).to(self._device)
            loss, nll = batch_losses(model, batch, self._recipe.optimization.label_smoothing)
            loss_sum, nll_sum = loss_sum + loss.item(), nll_sum + nll.item()
        target_tokens = int(lengths[1].sum())
        return loss_sum / target_tokens, nll_sum / target_tokens

    def _translate(self, model: Transformer) -> list[str]:
        """Return the greedy translations of the first pairs' sources."""
        source = self._pairs.tokens.source
        wanted = min(self._recipe.validation.max_translated_pairs, len(source.lengths_P))
        by_length = np.argsort(source.lengths_P[:wanted], kind="stable")
        decoder = TorchDecoder(model)
        translations = [""] * wanted
        for start in range(0, wanted, _TRANSLATION_BATCH_SENTENCES):
            index_B = by_length[start : start + _TRANSLATION_BATCH_SENTENCES]
            session = decoder.encode([source.sentence(index) for index in index_B])
            found = search(session, _GREEDY, self._max_lengths(source.lengths_P[index_B]), self._check)
            for index, hypotheses in zip(index_B, found, strict=True):
                translations[index] = self._subwords.decode(hypotheses[0].tokens)
        return translations

    def _max_lengths(self, source_lengths_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the longest translations, as Translate's default has them: two times the source plus 10."""
        return np.minimum(2 * source_lengths_B + 10, self._recipe.data.max_sentence_tokens)
