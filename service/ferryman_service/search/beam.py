"""Beam search over a running batch that sentences join and leave between steps; greedy search is a beam of one.

How to use it. `Searches` is what a RunningBatch is on the model's side, and both number the sentences alike:

    searches = Searches(batch.width, logits=..., attention=...)
    batch.admit(sources); searches.admit([SentenceSearch(...), ...])     # at any time between steps
    searches.step(batch)                                                 # feeds the batch, takes one step
    for sentence in searches.done(): ... searches.results(sentence) ...  # [RawHypothesis], best first
    batch.keep(kept_S); searches.keep(kept_S)                            # those that are done must leave before a step

`keep` also lets sentences leave that are not done. All searches of a batch have `width` rows (SearchOptions.rows);
where `needs_logits` holds for one of them, Searches must be made with logits=True; where one returns its alignment,
Searches and batch with attention=True. Otherwise their options may differ. A sentence's result depends on the model's
answers for its own rows alone. `search` does all this for sentences that come at once.

How it searches. At every step the candidates of a sentence are all continuations of its rows, best first by ranking
log-probability; equal ones by row, then by token. Of the first 2 * beam_size candidates, those that end the sentence
and stand among the first beam_size become finished hypotheses, and the first beam_size that do not end it become the
next rows: a finished hypothesis leaves no gap. PAD and BOS are never candidates, and the end symbol is none before
min_length. UNK is: where a model asks for it, it knows nothing better. Before the first step only row 0 counts.

The ranking log-probability is the model's, unless there is a repetition penalty: then it is that of the distribution
that the penalty leaves. What must not come (special symbols, n-grams) is left out without giving its probability to
others, and a forced token of a prefix counts with the model's own log-probability, unpenalised. A hypothesis's score is
its ranking log-probability / length ** length_penalty; its log_probability is always the model's. The length counts
subwords and, where it was reached, the end symbol. A beam is done

* with EarlyStopping.FIRST: as soon as beam_size * beam_patience hypotheses have finished (with a beam of one: one);
* with OPTIMAL: when so many have finished and no row can still yield one that belongs among the n_best. A row of
  log-probability p (never above 0, and it only falls) that would end with length l, t < l <= max_length, scores at most
  p / l ** length_penalty, which is largest at one of the two ends of that range;
* when no row is left that has a probability above 0;
* at its maximum length, where rows that have not ended are cut. They come after all finished hypotheses.

With sampling, each row continues itself with a token drawn at random; one that has ended leaves, and those behind it
move up. Temperature, top_k and top_p choose what is drawn but count in no score.

Shape suffixes: S sentences, N some of them or some hypotheses, W rows per sentence, K candidates per row, M = 2 * W
best candidates of a sentence, F places for finished hypotheses, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferryman_service.domain.tokens import BOS, EOS
from ferryman_service.search import state
from ferryman_service.search.continuations import NOT_PAD_OR_BOS, Changes, Continuations, allowed
from ferryman_service.search.decoder import Candidates, Decoder, RunningBatch
from ferryman_service.search.finished import FINISHED, add_finished
from ferryman_service.search.lattice import Lattice
from ferryman_service.search.sentence import (
    ALIGNMENT,
    MIN_LENGTH,
    OPTIMAL,
    TOKEN_SCORES,
    RawHypothesis,
    SentenceSearch,
    needs_logits,
)
from ferryman_service.search.topk import best_candidates

_MORE_THAN_ROWS: Final = 3
"""A row never needs more candidates than the W that may go on and the three special symbols."""


class Searches:
    """The searches of all sentences of one RunningBatch. Used by one thread at a time."""

    def __init__(self, width: int, *, logits: bool, attention: bool) -> None:
        self._width = width
        self._logits = logits
        self._attention = attention
        self._k = width + _MORE_THAN_ROWS
        self._searches: list[SentenceSearch] = []
        self._lattice = Lattice(width)
        self._changes = Changes(width)
        self._token_SW = np.empty((0, width), dtype=np.int64)
        self._parent_SW = np.empty((0, width), dtype=np.int64)
        self._done_N = np.empty(0, dtype=np.int64)
        self._bind(state.new_state([], [], width))

    @property
    def sentences(self) -> int:
        """S: how many sentences are being searched."""
        return len(self._searches)

    def admit(self, searches: Sequence[SentenceSearch]) -> None:
        """Put new sentences behind the present ones."""
        for search in searches:
            assert search.options.rows == self._width, "searches of a batch have equally many rows"
            assert self._logits or not needs_logits(search), "this search needs a batch with logits"
            assert self._attention or not search.uses & ALIGNMENT, "this search needs a batch with attention"
        self._searches.extend(searches)
        new = state.new_state(searches, self._lattice.take_places(len(searches)), self._width)
        bos_SW = np.full((len(searches), self._width), BOS)
        own_SW = np.tile(np.arange(self._width), (len(searches), 1))
        self._token_SW = np.concatenate((self._token_SW, bos_SW))
        self._parent_SW = np.concatenate((self._parent_SW, own_SW))
        self._bind(state.join(self._state, new))
        self._changes.admit(self.sentences, self._uses)

    def step(self, batch: RunningBatch) -> None:
        """Feed the batch with what the step before chose and choose anew. `done` says who is done then."""
        assert self.sentences, "a step of no sentences"
        assert not len(self._done_N), "sentences that are done must leave before the next step"
        self._lattice.make_room(self._longest + 1)
        if self._logits:
            logits_SWV = batch.step_logits(self._token_SW, self._parent_SW)
            self._advance(self._changes.continuations(logits_SWV, self._state, self._searches, self._uses))
        elif self._width == 1:
            self._advance_greedily(batch.step(self._token_SW, self._parent_SW, self._k))
        else:
            candidates = batch.step(self._token_SW, self._parent_SW, self._k)
            self._advance(allowed(candidates, self._state, self._uses))
        if self._uses & ALIGNMENT:
            attended_SW = batch.attention().argmax(axis=2)
            self._lattice.write_attended(self._place_S, self._length_S - 1, attended_SW)

    def done(self) -> NDArray[np.int64]:
        """Return the numbers of the sentences that are done, rising."""
        return self._done_N

    def results(self, sentence: int) -> list[RawHypothesis]:
        """Return the hypotheses of a sentence that is done, best first: n_best, or fewer if no more were found."""
        assert sentence in self._done_N, f"sentence {sentence} is not done"
        search, record = self._searches[sentence], self._state[sentence]
        n_best, length = search.options.n_best, int(record["length"])
        best = np.argsort(-record["finished"]["score"], kind="stable")[:n_best]
        found = [
            self._hypothesis(sentence, (steps, row), log_prob, score, finished=True)
            for score, log_prob, steps, row in record["finished"][best].tolist()
            if score > -np.inf
        ]
        if len(found) == n_best:
            return found
        by_rank = np.argsort(-record["ranked"], kind="stable")[: n_best - len(found)]
        for row in by_rank[record["ranked"][by_rank] > -np.inf].tolist():
            score = float(record["ranked"][row]) / float(length) ** search.options.length_penalty
            log_prob = float(self._log_prob_SW[sentence, row])
            found.append(self._hypothesis(sentence, (length, row), log_prob, score, finished=False))
        return found

    def keep(self, kept_S: NDArray[np.int64]) -> None:
        """Let all sentences leave but these: their numbers, rising. Sentence i becomes kept_S[i]'s."""
        stays_S = np.zeros(self.sentences, dtype=bool)
        stays_S[kept_S] = True
        assert (kept_S[1:] > kept_S[:-1]).all(), "the numbers of sentences that stay must rise"
        assert not stays_S[self._done_N].any(), "sentences that are done must leave"
        self._lattice.free_places(self._place_S[~stays_S].tolist())
        self._searches = [self._searches[sentence] for sentence in kept_S.tolist()]
        self._token_SW = self._token_SW[kept_S]
        self._parent_SW = self._parent_SW[kept_S]
        self._done_N = np.empty(0, dtype=np.int64)
        self._bind(state.keep(self._state, kept_S))
        self._changes.keep(kept_S, self._uses)

    def _bind(self, records: NDArray[np.void]) -> None:
        """Take over the records of the sentences, and names for their fields: to look one up takes time."""
        self._state = records
        self._settings_S = records["settings"]
        self._max_length_S = self._settings_S["max_length"]
        self._length_penalty_S = self._settings_S["length_penalty"]
        self._place_S = records["place"]
        self._finished_SF = records["finished"]
        self._found_S, self._stored_S = records["found"], records["stored"]
        self._length_S = records["length"]
        self._ranked_SW = records["ranked"]
        self._log_prob_SW = records["log_prob"] if self._logits else records["ranked"]
        self._number_S = np.arange(len(records))
        self._uses = int(np.bitwise_or.reduce(self._settings_S["uses"]))
        self._longest = int(self._length_S.max(initial=0))

    def _advance(self, found: Continuations) -> None:
        """Take one step: finish what ends, go on with the best of the rest."""
        sentences, width, k = found.token_SWK.shape
        number_S1 = self._number_S[:, None]
        total_SWK = found.ranked_SWK + self._ranked_SW[:, :, None]
        best_SM = best_candidates(total_SWK.reshape(sentences, -1), 2 * width)
        if len(found.sampled_N):
            own_W = np.arange(0, width * k, k)
            best_SM[found.sampled_N] = np.concatenate((own_W, own_W + 1))  # the second candidate has probability 0
        parent_SM = best_SM // k
        flat_SM = best_SM + number_S1 * (width * k)
        token_SM, ranked_SM = found.token_SWK.take(flat_SM), total_SWK.take(flat_SM)
        log_prob_SM = ranked_SM
        if self._logits:
            log_prob_SM = found.log_prob_SWK.take(flat_SM) + np.take_along_axis(self._log_prob_SW, parent_SM, axis=1)
        ends_SM = token_SM == EOS
        self._finish(ends_SM, ranked_SM, log_prob_SM, parent_SM)

        ranked_SM[ends_SM] = -np.inf
        goes_on_SW = np.sort((ranked_SM == -np.inf) * (2 * width) + np.arange(2 * width), axis=1)[:, :width]
        flat_SW = goes_on_SW % (2 * width) + number_S1 * (2 * width)
        self._token_SW, self._parent_SW = token_SM.take(flat_SW), parent_SM.take(flat_SW)
        self._ranked_SW[...] = ranked_SM.take(flat_SW)
        if self._logits:
            self._log_prob_SW[...] = log_prob_SM.take(flat_SW)
            self._changes.append(self._parent_SW, self._token_SW, self._length_S)
        self._lattice.write(self._place_S, self._length_S, self._token_SW, self._parent_SW)
        self._end_step()

    def _finish(
        self,
        ends_SM: NDArray[np.bool_],
        ranked_SM: NDArray[np.float64],
        log_prob_SM: NDArray[np.float64],
        parent_SM: NDArray[np.int64],
    ) -> None:
        """Take the first W candidates that end into the finished hypotheses."""
        finishes_SW = ends_SM[:, : self._width] & (ranked_SM[:, : self._width] > -np.inf)
        flat_N = np.flatnonzero(finishes_SW)
        if not len(flat_N):
            return
        sentence_N = flat_N // self._width
        flat_N += sentence_N * self._width  # in SM, where a sentence has twice the places
        ranked_N, length_N = ranked_SM.take(flat_N), self._length_S[sentence_N]
        new_N = np.empty(len(flat_N), dtype=FINISHED)
        new_N["score"] = ranked_N / (length_N + 1.0) ** self._length_penalty_S[sentence_N]
        new_N["log_prob"] = log_prob_SM.take(flat_N)
        new_N["steps"] = length_N
        new_N["row"] = parent_SM.take(flat_N)
        self._found_S += add_finished(self._finished_SF, self._stored_S, sentence_N, new_N)

    def _end_step(self) -> None:
        """Count the step, and see which sentences are done; the module's docstring says when."""
        if self._uses & TOKEN_SCORES:
            self._lattice.write_log_probs(self._place_S, self._length_S, self._log_prob_SW)
        self._length_S += 1
        self._longest += 1
        done_S = self._found_S >= self._settings_S["needed"]
        if self._uses & OPTIMAL:
            done_S &= ~self._is_hopeful()
        done_S |= self._length_S == self._max_length_S
        done_S |= self._ranked_SW[:, 0] == -np.inf
        self._done_N = np.flatnonzero(done_S)

    def _is_hopeful(self) -> NDArray[np.bool_]:
        """Tell which sentences must go on because a row may still yield one of the n_best."""
        best_S, penalty_S = self._ranked_SW[:, 0], self._length_penalty_S
        at_shortest_S = best_S / (self._length_S + 1.0) ** penalty_S
        at_longest_S = best_S / self._max_length_S**penalty_S
        to_beat_S = np.sort(self._finished_SF["score"], axis=1)[self._number_S, -self._settings_S["n_best"]]
        is_optimal_S = self._settings_S["uses"] & OPTIMAL > 0
        hopeful_S: NDArray[np.bool_] = is_optimal_S & (np.maximum(at_shortest_S, at_longest_S) > to_beat_S)
        return hopeful_S

    def _advance_greedily(self, candidates: Candidates) -> None:
        """Take one step of one row per sentence: the short form of `_advance`."""
        token_S1, log_prob_S1 = candidates.tokens_SWK[:, :, 0].copy(), candidates.log_probs_SWK[:, :, 0]
        special = np.minimum.reduce(token_S1, axis=None) <= EOS
        if special and (self._uses & MIN_LENGTH or (token_S1 & NOT_PAD_OR_BOS == 0).any()):
            token_S1, log_prob_S1 = self._first_allowed(candidates)
        self._token_SW = token_S1
        self._ranked_SW += log_prob_S1
        self._lattice.write_greedy(self._place_S, self._length_S, token_S1[:, 0])
        if special:
            self._finish_greedily(np.flatnonzero((token_S1 == EOS) & (self._ranked_SW > -np.inf)))
        self._end_step()

    def _first_allowed(self, candidates: Candidates) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return each row's best candidate of those that may be chosen, token_S1 and log_prob_S1."""
        found = allowed(candidates, self._state, self._uses)
        best_S11 = found.ranked_SWK.argmax(axis=2, keepdims=True)
        token_S11 = np.take_along_axis(found.token_SWK, best_S11, axis=2)
        return token_S11[:, :, 0], np.take_along_axis(found.ranked_SWK, best_S11, axis=2)[:, :, 0]

    def _finish_greedily(self, sentence_N: NDArray[np.int64]) -> None:
        finished_S, log_prob_N = self._finished_SF[:, 0], self._ranked_SW[sentence_N, 0]
        length_N = self._length_S[sentence_N]
        finished_S["score"][sentence_N] = log_prob_N / (length_N + 1.0) ** self._length_penalty_S[sentence_N]
        finished_S["log_prob"][sentence_N] = log_prob_N
        finished_S["steps"][sentence_N] = length_N
        self._found_S[sentence_N] = 1

    def _hypothesis(
        self, sentence: int, end: tuple[int, int], log_prob: float, score: float, *, finished: bool
    ) -> RawHypothesis:
        """Read a hypothesis back that is a certain row after so many steps: `end` is (steps, row)."""
        place, uses = int(self._place_S[sentence]), self._searches[sentence].uses
        tokens, path = self._lattice.path(place, *end)
        token_log_probs: list[float] = []
        if uses & TOKEN_SCORES:
            totals = [0.0, *self._lattice.log_probs(place, path), *([log_prob] if finished else [])]
            token_log_probs = [after - before for before, after in itertools.pairwise(totals)]
        parents = [0, *path][: len(tokens) + finished]
        return RawHypothesis(
            tokens=tuple(tokens),
            log_probability=log_prob,
            score=score,
            finished=finished,
            token_log_probs=tuple(token_log_probs),
            alignment=tuple(self._lattice.attended(place, parents)) if uses & ALIGNMENT else (),
        )


def search(
    decoder: Decoder,
    sources: Sequence[Sequence[int]],
    searches: Sequence[SentenceSearch],
    check: Callable[[], None],
) -> list[list[RawHypothesis]]:
    """Return the hypotheses for each sentence (subword ids, end symbol included), best first.

    Sentences whose searches can share a batch do. `check` is called before every step and may raise, to stop them.
    """
    groups: dict[tuple[int, bool, bool], list[int]] = {}
    for number, one in enumerate(searches):
        key = one.options.rows, needs_logits(one), one.options.return_alignment
        groups.setdefault(key, []).append(number)
    found: list[list[RawHypothesis]] = [[] for _ in sources]
    for (width, logits, attention), numbers in groups.items():
        batch, running = decoder.batch(width, attention=attention), Searches(width, logits=logits, attention=attention)
        batch.admit([sources[number] for number in numbers])
        running.admit([searches[number] for number in numbers])
        number_S = np.array(numbers)
        while running.sentences:
            check()
            running.step(batch)
            done_N = running.done()
            for sentence in done_N.tolist():
                found[number_S[sentence]] = running.results(sentence)
            if len(done_N):
                kept_S = np.delete(np.arange(running.sentences), done_N)
                batch.keep(kept_S)
                running.keep(kept_S)
                number_S = number_S[kept_S]
    return found
