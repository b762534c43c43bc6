"""Label-smoothed cross-entropy over a large vocabulary (Szegedy et al., 2016, section 7; PyTorch's convention), and
R-Drop (Liang et al., 2021, section 2.1).

Of K subwords the correct one gets 1 - epsilon + epsilon / K, every other epsilon / K: 0.91 and 0.01 for K = 10 and
epsilon = 0.1. Special symbols are subwords like others here.

The logits are never all in memory: chunk by chunk they become probabilities and then, in place, the gradient, so that
on a CPU a chunk stays in the cache. What smoothing spreads evenly over the subwords needs no logits: it is the mean of
the rows of the matrix, and is added at the end.

Shape suffixes: N target tokens, padding left out; C those of a chunk; D model width, V vocabulary (K above).
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ferryman_service.training.compile import fused

_CHUNK_ELEMENTS: Final = {"cpu": 2**21, "cuda": 2**27}


def smoothed_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, label_smoothing: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return the sums over N of the smoothed loss and of the negative log-likelihood (not differentiable), in nats.

    The logits are hidden_ND @ weight_VD.T, multiplied in `dtype`; softmax and sums are in FP32.
    """
    loss, nll = _ProjectedCrossEntropy.apply(hidden_ND, weight_VD, labels_N, label_smoothing, dtype)  # type: ignore[no-untyped-call]
    return loss, nll


def r_drop_loss(
    hidden_2ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    label_smoothing: float,
    alpha: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return the sums over N of the R-Drop loss and of the negative log-likelihood (not differentiable), in nats.

    `hidden_2ND` holds two passes over the same N tokens, one after the other. The loss is the mean of the passes'
    smoothed cross-entropies plus alpha / 4 times the sum of the two Kullback-Leibler divergences between them: half the
    paper's, so that alpha 0 leaves the ordinary loss.
    """
    loss, nll = _ProjectedRDrop.apply(hidden_2ND, weight_VD, labels_N, label_smoothing, alpha, dtype)  # type: ignore[no-untyped-call]
    return loss, nll


class _Projection:
    """The product of hidden states and vocabulary matrix, chunk by chunk, and the gradients of both."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> None:
        self.device_type = hidden_ND.device.type
        self.rows = max(1, _CHUNK_ELEMENTS[self.device_type] // weight_VD.shape[0])
        # FP64 in: FP64 throughout, as the tests of the gradient want it.
        self._dtype = hidden_ND.dtype if hidden_ND.dtype is torch.float64 else dtype
        self.exact = self._dtype if self._dtype is torch.float64 else torch.float32
        self._hidden_ND = hidden_ND.to(self._dtype)
        self._weight_VD = weight_VD.to(self._dtype)
        self._weight_sum_D = self._weight_VD.sum(dim=0, dtype=self.exact)
        self._hidden_sum_D = self._hidden_ND.sum(dim=0, dtype=self.exact)
        self.hidden_grad_ND = torch.empty_like(self._hidden_ND)
        self.weight_grad_VD = torch.zeros_like(weight_VD, dtype=self.exact)

    def logits(self, chunk: slice) -> Tensor:
        """Return logits_CV of the chunk's rows, fresh memory."""
        return F.linear(self._hidden_ND[chunk], self._weight_VD)

    def sum_of_logits(self) -> Tensor:
        """Return the sum of all logits of all rows."""
        return self._hidden_sum_D @ self._weight_sum_D

    def add(self, chunk: slice, grad_CV: Tensor) -> None:
        """Take the gradient of the chunk's logits."""
        torch.mm(grad_CV, self._weight_VD, out=self.hidden_grad_ND[chunk])
        if self._dtype is self.exact:
            self.weight_grad_VD.addmm_(grad_CV.t(), self._hidden_ND[chunk])
        else:
            self.weight_grad_VD += grad_CV.t() @ self._hidden_ND[chunk]

    def add_everywhere(self, value: float) -> None:
        """Take this as a further gradient of every logit of every row."""
        self.hidden_grad_ND.add_((value * self._weight_sum_D).to(self._dtype))
        self.weight_grad_VD.add_(value * self._hidden_sum_D)


class _ProjectedCrossEntropy(torch.autograd.Function):
    """The gradients are ready after the forward pass: d loss / d logits = softmax(logits) - target distribution."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch's context has no public type)
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        label_smoothing: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        vocabulary = weight_VD.shape[0]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            parts = _Projection(hidden_ND, weight_VD, dtype)
            nll = normaliser = hidden_ND.new_zeros((), dtype=parts.exact)
            softmax = fused(_softmax, parts.device_type)
            for start in range(0, len(labels_N), parts.rows):
                chunk = slice(start, start + parts.rows)
                logits_CV, label_C1 = parts.logits(chunk), labels_N[chunk, None]
                label_logit_C1 = logits_CV.gather(1, label_C1).to(parts.exact)
                probs_CV, normaliser_C1 = softmax(logits_CV, parts.exact)
                nll = nll + (normaliser_C1 - label_logit_C1).sum()
                normaliser = normaliser + normaliser_C1.sum()
                if any(ctx.needs_input_grad):
                    label_prob_C1 = (label_logit_C1 - normaliser_C1).exp()
                    grad_CV = _with_label(probs_CV, label_C1, label_prob_C1 - (1.0 - label_smoothing))
                    parts.add(chunk, grad_CV)
            uniform = vocabulary * normaliser - parts.sum_of_logits()
            parts.add_everywhere(-label_smoothing / vocabulary)
        ctx.save_for_backward(parts.hidden_grad_ND, parts.weight_grad_VD)
        ctx.mark_non_differentiable(nll)
        return (1.0 - label_smoothing) * nll + label_smoothing / vocabulary * uniform, nll

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        hidden_grad_ND, weight_grad_VD = ctx.saved_tensors
        return hidden_grad_ND * loss_grad, weight_grad_VD * loss_grad, None, None, None


class _ProjectedRDrop(torch.autograd.Function):
    """As above, for two passes with distributions p and q."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch's context has no public type)
        hidden_2ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        label_smoothing: float,
        alpha: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        vocabulary, count = weight_VD.shape[0], len(labels_N)
        with torch.autocast(hidden_2ND.device.type, enabled=False):
            parts = _Projection(hidden_2ND, weight_VD, dtype)
            nll = normaliser = divergence = hidden_2ND.new_zeros((), dtype=parts.exact)
            pull = fused(_pull_together, parts.device_type)
            for start in range(0, count, parts.rows):
                chunk = slice(start, min(start + parts.rows, count))
                other = slice(count + chunk.start, count + chunk.stop)
                label_C1 = labels_N[chunk, None]
                p_CV, q_CV = parts.logits(chunk), parts.logits(other)
                labels_C1 = [logits_CV.gather(1, label_C1).to(parts.exact) for logits_CV in (p_CV, q_CV)]
                grads_CV, normalisers_C1, divergences_C1 = pull(p_CV, q_CV, alpha, parts.exact)
                logs_C1 = [label - each for label, each in zip(labels_C1, normalisers_C1, strict=True)]
                nll = nll - sum(log_C1.sum() for log_C1 in logs_C1) / 2
                normaliser = normaliser + sum(each.sum() for each in normalisers_C1) / 2
                divergence = divergence + sum(each.sum() for each in divergences_C1)
                p_C1, q_C1 = (log_C1.exp() for log_C1 in logs_C1)
                at_label = _pulls(p_C1, q_C1, logs_C1[0] - logs_C1[1], divergences_C1, alpha)
                for each, grad_CV, label_grad_C1 in zip((chunk, other), grads_CV, at_label, strict=True):
                    parts.add(each, _with_label(grad_CV, label_C1, label_grad_C1 - (1.0 - label_smoothing) / 2))
            uniform = vocabulary * normaliser - parts.sum_of_logits() / 2
            parts.add_everywhere(-label_smoothing / vocabulary / 2)
        ctx.save_for_backward(parts.hidden_grad_ND, parts.weight_grad_VD)
        ctx.mark_non_differentiable(nll)
        smoothed = (1.0 - label_smoothing) * nll + label_smoothing / vocabulary * uniform
        return smoothed + alpha / 4 * divergence, nll

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        hidden_grad_ND, weight_grad_VD = ctx.saved_tensors
        return hidden_grad_ND * loss_grad, weight_grad_VD * loss_grad, None, None, None, None


def _softmax(logits_CV: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return probs_CV, in the type of the logits, and the logarithm normaliser_C1 of the sum of their exponentials.

    May overwrite the logits.
    """
    probs_CV, normaliser_C1 = _exact_softmax(logits_CV.to(exact))
    return probs_CV.to(logits_CV.dtype), normaliser_C1


def _exact_softmax(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    largest_C1 = logits_CV.amax(dim=1, keepdim=True)
    probs_CV = logits_CV.sub_(largest_C1).exp_()
    sum_C1 = probs_CV.sum(dim=1, keepdim=True)
    return probs_CV.div_(sum_C1), sum_C1.log() + largest_C1


def _pull_together(
    p_CV: Tensor, q_CV: Tensor, alpha: float, exact: torch.dtype
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return for the logits of two passes what `_pulls` returns, their normaliser_C1, and their divergence_C1.

    May overwrite the logits.
    """
    dtype = p_CV.dtype
    p_CV, q_CV = p_CV.to(exact), q_CV.to(exact)
    ratio_CV = p_CV - q_CV
    (p_CV, first_C1), (q_CV, second_C1) = _exact_softmax(p_CV), _exact_softmax(q_CV)
    ratio_CV.sub_(first_C1 - second_C1)
    divergences_C1 = [(p_CV * ratio_CV).sum(dim=1, keepdim=True), -(q_CV * ratio_CV).sum(dim=1, keepdim=True)]
    grads_CV = _pulls(p_CV, q_CV, ratio_CV, divergences_C1, alpha)
    return [grad_CV.to(dtype) for grad_CV in grads_CV], [first_C1, second_C1], divergences_C1


def _pulls(p: Tensor, q: Tensor, ratio: Tensor, divergences: list[Tensor], alpha: float) -> list[Tensor]:
    """Return the gradients of both passes' logits, for probabilities p and q and ratio = log p - log q: of half the
    logarithm that normalises each, and of alpha / 4 (a + b) with the divergences a = KL(p||q) and b = KL(q||p).

    d (a + b) / d logits_p = p (ratio - a) + p - q, and the other way round for q, whose ratio is the negative.
    """
    quarter = alpha / 4
    own_p, own_q = (quarter * (1.0 - divergence) + 0.5 for divergence in divergences)
    return [
        torch.add(own_p, ratio, alpha=quarter).mul_(p).sub_(q, alpha=quarter),
        torch.add(own_q, ratio, alpha=-quarter).mul_(q).sub_(p, alpha=quarter),
    ]


def _with_label(grad_CV: Tensor, label_C1: Tensor, label_grad_C1: Tensor) -> Tensor:
    """Return grad_CV with the labels' gradients, which are computed in full precision: they are small differences."""
    return grad_CV.scatter_(1, label_C1, label_grad_C1.to(grad_CV.dtype))
