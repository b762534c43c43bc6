"""Validation: the loss on held-out pairs, and BLEU and chrF of their translations.

Shape suffixes: B sentences of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sacrebleu.metrics.chrf import CHRF

from ferryman_service.domain.recipe import Recipe, SelectionMetric
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.tracing import NULL_TRACER, Tracer
from ferryman_service.domain.translation import SearchOptions
from ferryman_service.model.session import TorchDecoder
from ferryman_service.model.transformer import Transformer
from ferryman_service.search.beam import search
from ferryman_service.search.sentence import SentenceSearch
from ferryman_service.text.subwords import Subwords
from ferryman_service.training.batches import make_batch
from ferryman_service.training.data import ValidationPairs
from ferryman_service.training.packing import Index, batches_by_length
from ferryman_service.training.scores import ValidationScores
from ferryman_service.training.scoring import Scoring, scoring_of
from ferryman_service.training.significance import sentence_statistics
from ferryman_service.training.step import batch_losses

_GREEDY: Final = SearchOptions(beam_size=1)
_LOSS_BATCH_TARGET_TOKENS: Final = 4096
_TRANSLATION_BATCH_SENTENCES: Final = 64

_Found = TypeVar("_Found")


class Validator:
    """Scores weights on the validation pairs of a corpus.

    A batch that does not fit into the device's memory is computed in halves; `was_split` says whether that happened in
    the last call of `score`.
    """

    def __init__(
        self,
        pairs: ValidationPairs,
        subwords: Subwords,
        recipe: Recipe,
        device: torch.device,
        check: Callable[[], None],
        tracer: Tracer = NULL_TRACER,
        scoring: Scoring | None = None,
    ) -> None:
        self._pairs = pairs
        self._scoring = scoring or scoring_of("")
        self._subwords = subwords
        self._recipe = recipe
        self._device = device
        self._check = check
        self._tracer = tracer
        self.was_split = False

    @property
    def metric(self) -> SelectionMetric:
        """The score that decides which weights are better: the recipe's, or chrF where BLEU has no tokenizer."""
        return self._scoring.metric(self._recipe.validation.metric)

    @property
    def loss_pairs(self) -> int:
        """The number of pairs behind the loss."""
        return len(self._pairs.sources)

    @property
    def bleu_signature(self) -> str:
        """The signature of the BLEU that `score` returns, as sacreBLEU writes it."""
        return self._scoring.bleu_signature()

    def score(self, model: Transformer) -> ValidationScores:
        """Return the model's scores; leaves it in the mode in which it came. Raises what `check` raises, and
        TrainingFailed (OUT_OF_MEMORY) if not even a single pair fits."""
        with self._tracer.span("validate", {"ferryman.pairs": len(self._pairs.sources)}) as span:
            scores = self._score(model)
            span.set({"ferryman.loss": scores.loss, "ferryman.bleu": scores.bleu, "ferryman.chrf": scores.chrf})
        return scores

    def _score(self, model: Transformer) -> ValidationScores:
        was_training, self.was_split = model.training, False
        model.eval()
        try:
            loss, nll_per_token = self._losses(model)
            translations = self._translate(model)
        finally:
            model.train(was_training)
        references = self._pairs.references[: len(translations)]
        return ValidationScores(
            loss=loss,
            nll_per_token=nll_per_token,
            bleu=self._scoring.bleu_score(translations, references),
            chrf=CHRF().corpus_score(translations, [references]).score,
            translated_pairs=len(translations),
            statistics=tuple(sentence_statistics(self.metric, self._scoring, translations, references)),
        )

    @torch.inference_mode()
    def _losses(self, model: Transformer) -> tuple[float, float]:
        tokens = self._pairs.tokens
        lengths = tokens.source.lengths_P, tokens.target.lengths_P
        loss_sum = nll_sum = 0.0
        for index_B in batches_by_length(*lengths, _LOSS_BATCH_TARGET_TOKENS):
            self._check()
            for _, (loss, nll) in self._as_it_fits(lambda part_B: self._batch_losses(model, part_B), index_B):
                loss_sum, nll_sum = loss_sum + loss, nll_sum + nll
        target_tokens = int(lengths[1].sum())
        return loss_sum / target_tokens, nll_sum / target_tokens

    def _batch_losses(self, model: Transformer, index_B: Index) -> tuple[float, float]:
        batch = make_batch(self._pairs.tokens, index_B).to(self._device)
        loss, nll = batch_losses(model, batch, self._recipe.optimization.label_smoothing)
        return loss.item(), nll.item()

    def _translate(self, model: Transformer) -> list[str]:
        """Return the greedy translations of the first pairs' sources."""
        source = self._pairs.tokens.source
        wanted = min(self._recipe.validation.max_translated_pairs, len(source.lengths_P))
        by_length = np.argsort(source.lengths_P[:wanted], kind="stable")
        decoder = TorchDecoder(model)
        translations = [""] * wanted
        for start in range(0, wanted, _TRANSLATION_BATCH_SENTENCES):
            index_B = by_length[start : start + _TRANSLATION_BATCH_SENTENCES]
            for part_B, texts in self._as_it_fits(lambda part_B: self._translate_batch(decoder, part_B), index_B):
                for index, text in zip(part_B, texts, strict=True):
                    translations[index] = text
        return translations

    def _translate_batch(self, decoder: TorchDecoder, index_B: Index) -> list[str]:
        source = self._pairs.tokens.source
        limits = self._max_lengths(source.lengths_P[index_B]).tolist()
        searches = [SentenceSearch(options=_GREEDY, max_length=limit) for limit in limits]
        found = search(decoder, [source.sentence(index) for index in index_B], searches, self._check)
        # Weights that are not finite give no hypothesis: no probability can be compared.
        return [self._subwords.decode(hypotheses[0].tokens) if hypotheses else "" for hypotheses in found]

    def _as_it_fits(self, work: Callable[[Index], _Found], index_B: Index) -> Iterator[tuple[Index, _Found]]:
        """Yield the pairs with what `work` returns for them: all at once, or in parts where memory is short."""
        try:
            found = work(index_B)
        except torch.OutOfMemoryError as error:
            if len(index_B) == 1:
                raise TrainingFailed(FailureReason.OUT_OF_MEMORY, self._too_large(index_B[0])) from error
        else:
            yield index_B, found
            return
        self.was_split = True
        torch.cuda.empty_cache()
        for half_B in np.array_split(index_B, 2):
            yield from self._as_it_fits(work, half_B)

    def _too_large(self, index: int) -> str:
        source, target = (side.lengths_P[index] for side in (self._pairs.tokens.source, self._pairs.tokens.target))
        return (
            f"validation: a single pair of shape (1, {source}) to (1, {target}) does not fit into what training leaves "
            "of the device's memory: lower optimization.batch_target_tokens or data.max_sentence_tokens"
        )

    def _max_lengths(self, source_lengths_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the longest translations, as Translate's default has them: two times the source plus 10."""
        return np.minimum(2 * source_lengths_B + 10, self._recipe.data.max_sentence_tokens)
