"""The search as a textbook would have it: one sentence, lists and dictionaries, everything computed anew in each step,
in Python's own numbers. Written from the module docstring of search/beam.py and from the contract."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from ferryman_service.domain.tokens import BOS, EOS, PAD
from ferryman_service.domain.translation import EarlyStopping
from ferryman_service.search.sentence import RawHypothesis, needs_logits
from tests.fakes.decoder import fake_attention, fake_logits

CLOSE = 1e-5


class TooClose(Exception):
    """Two choices are so close that 32-bit and 64-bit numbers may disagree about the better."""


@dataclass(frozen=True)
class Row:
    tokens: tuple[int, ...] = ()
    ranked: float = 0.0
    log_probs: tuple[float, ...] = ()

    def then(self, token, ranked, log_prob):
        return Row((*self.tokens, token), self.ranked + ranked, (*self.log_probs, log_prob))

    @property
    def log_probability(self):
        total = 0.0
        for log_prob in self.log_probs:
            total += log_prob
        return total


class Reference:
    """`exact`: the batch's log-probabilities are those of the model, to the last bit, so nothing is too close."""

    def __init__(self, model, source, search, *, exact):
        assert not (exact and needs_logits(search))
        self.model, self.source, self.search, self.exact = model, source, search, exact
        self.options = search.options

    def run(self):
        rows = [Row() for _ in range(1 if self.options.sampling is None else self.options.n_best)]
        ended = []
        for _ in range(self.search.max_length):
            advance = self.beam_step if self.options.sampling is None else self.sampling_step
            rows, newly_ended = advance(rows)
            ended += newly_ended
            if not rows or self.is_enough(ended):
                break
        else:
            return self.n_best(ended, rows)
        return self.n_best(ended, [])

    def is_enough(self, ended):
        if self.options.sampling is not None:
            return False
        if self.options.beam_size == 1:
            return bool(ended)
        if self.options.early_stopping is EarlyStopping.OPTIMAL:
            return False  # that which can be no more is found to be no more, in the end
        return len(ended) >= math.ceil(self.options.beam_size * self.options.beam_patience - 1e-9)

    def n_best(self, ended, cut):
        hypotheses = []
        for rows, finished in ((ended, True), (cut, False)):
            found = [self.hypothesis(row, finished) for row in rows]
            found.sort(key=lambda hypothesis: -hypothesis.score)
            self.check_order([(-hypothesis.score, hypothesis.tokens) for hypothesis in found])
            hypotheses += found
        return hypotheses[: self.options.n_best]

    def hypothesis(self, row, finished):
        alignment = [
            int(fake_attention(self.source, (BOS, *row.tokens[:step])).argmax()) for step in range(len(row.tokens))
        ]
        return RawHypothesis(
            tokens=row.tokens[:-1] if finished else row.tokens,
            log_probability=row.log_probability,
            score=row.ranked / float(len(row.tokens)) ** self.options.length_penalty,
            finished=finished,
            token_log_probs=row.log_probs if self.options.return_token_scores else (),
            alignment=tuple(alignment) if self.options.return_alignment else (),
        )

    def beam_step(self, rows):
        beam_size = self.options.beam_size
        candidates = []
        for number, row in enumerate(rows):
            for token, (ranked, log_prob) in self.distribution(row.tokens).items():
                candidates.append((-(row.ranked + ranked), number, token, row.then(token, ranked, log_prob)))
        candidates.sort(key=lambda candidate: candidate[:3])
        self.check_order([(key, number) for key, number, *_ in candidates[: 2 * beam_size + 1]])
        best = candidates[: 2 * beam_size]
        ended = [row for *_, token, row in best[:beam_size] if token == EOS]
        return [row for *_, token, row in best if token != EOS][:beam_size], ended

    def sampling_step(self, rows):
        going_on, ended = [], []
        for number, row in enumerate(rows):
            distribution = self.distribution(row.tokens)
            if distribution:
                token = self.draw(distribution, number, len(row.tokens))
                (ended if token == EOS else going_on).append(row.then(token, *distribution[token]))
        return going_on, ended

    def distribution(self, tokens):
        """Return {token: (what to rank it by, its log-probability)} of all that may come."""
        answer = self.model(self.source, (BOS, *tokens))
        logits = (answer if self.exact else fake_logits(answer)).tolist()
        log_probs = logits if self.exact else log_softmax(logits)
        if len(tokens) < len(self.search.prefix):
            forced = self.search.prefix[len(tokens)]
            return {forced: (log_probs[forced], log_probs[forced])}
        ranked = log_probs
        if self.options.repetition_penalty != 1.0:
            ranked = log_softmax([self.penalised(logit, token in tokens) for token, logit in enumerate(logits)])
        return {
            token: (ranked[token], log_probs[token])
            for token in range(len(logits))
            if self.may_come(token, tokens) and ranked[token] > -math.inf
        }

    def penalised(self, logit, is_repeated):
        penalty = self.options.repetition_penalty
        if not is_repeated:
            return logit
        return logit / penalty if logit > 0 else logit * penalty

    def may_come(self, token, tokens):
        if token in (PAD, BOS) or (token == EOS and len(tokens) < self.search.min_length):
            return False
        size = self.options.no_repeat_ngram_size
        ngrams = {tokens[start : start + size] for start in range(len(tokens) - size + 1)}
        return size == 0 or len(tokens) < size or (*tokens[len(tokens) - size + 1 :], token) not in ngrams

    def draw(self, distribution, row, position):
        sampling = self.options.sampling
        best = max(ranked for ranked, _ in distribution.values())
        weights = {
            token: math.exp((ranked - best) / sampling.temperature) for token, (ranked, _) in distribution.items()
        }
        if sampling.top_k or sampling.top_p < 1:
            weights = dict(sorted(weights.items(), key=lambda item: (-item[1], item[0])))
            self.check_order([(-weight, 0) for weight in weights.values()])
        if sampling.top_k:
            weights = dict(list(weights.items())[: sampling.top_k])
        if sampling.top_p < 1:
            weights = self.nucleus(weights, sampling.top_p)
        wanted, total = random_number(self.search.seed, row, position) * sum(weights.values()), 0.0
        for token, weight in weights.items():
            total += weight
            self.check_distance(total, wanted)
            if total > wanted:
                return token
        raise AssertionError("the weights have been used up")

    def nucleus(self, weights, top_p):
        limit, total, kept = top_p * sum(weights.values()), 0.0, {}
        for token, weight in weights.items():
            kept[token] = weight
            total += weight
            self.check_distance(total, limit)
            if total >= limit:
                break
        return kept

    def check_distance(self, one, other):
        if not self.exact and abs(one - other) < CLOSE:
            raise TooClose

    def check_order(self, keys):
        """Equal ones of the same origin have their order from elsewhere."""
        for (one, origin), (other, other_origin) in itertools.pairwise(keys):
            if not self.exact and other - one < CLOSE and (one != other or origin != other_origin):
                raise TooClose


def log_softmax(logits):
    largest = max(logits)
    total = math.log(sum(math.exp(logit - largest) for logit in logits))
    return [logit - largest - total for logit in logits]


def random_number(seed, row, position):
    """Return a number in [0, 1): splitmix64 with Python's integers."""
    hashed = splitmix64(splitmix64(splitmix64(seed) + row) + position)
    return (hashed >> 12) / 2**52


def splitmix64(x):
    whole = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & whole
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
    return x ^ (x >> 31)
