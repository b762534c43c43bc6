"""Label-smoothed cross-entropy over a large vocabulary (Szegedy et al., 2016, section 7; PyTorch's convention), and
R-Drop (Liang et al., 2021, section 2.2).

Of K subwords the correct one gets 1 - epsilon + epsilon / K, every other epsilon / K: 0.91 and 0.01 for K = 10 and
epsilon = 0.1. Special symbols are subwords like others here.

Shape suffixes: N target tokens, padding left out; C those of a chunk; D model width, V vocabulary (K above).
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_ELEMENTS: Final = {"cpu": 2**21, "cuda": 2**27}


def smoothed_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, label_smoothing: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return the sums over N of the smoothed loss and of the negative log-likelihood (not differentiable), in nats.

    The logits are hidden_ND @ weight_VD.T, multiplied in `dtype`. They are never all in memory: chunk by chunk they
    become log-probabilities and then, in place, their own gradient, so that a chunk stays in the cache and nothing is
    computed twice.
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


class _Gradients:
    """What the chunks of a forward pass add up to: sums of losses, and the gradients of what was projected."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> None:
        self.rows = max(1, _CHUNK_ELEMENTS[hidden_ND.device.type] // weight_VD.shape[0])
        # FP64 in: FP64 throughout, as the tests of the gradient want it.
        self.dtype = hidden_ND.dtype if hidden_ND.dtype is torch.float64 else dtype
        self.exact = self.dtype if self.dtype is torch.float64 else torch.float32
        self.hidden_ND = hidden_ND.to(self.dtype)
        self.weight_VD = weight_VD.to(self.dtype)
        self.hidden_grad_ND = torch.empty_like(self.hidden_ND)
        self.weight_grad_VD = torch.zeros_like(weight_VD, dtype=self.exact)

    def log_probs(self, chunk: slice) -> Tensor:
        """Return log_probs_CV of the chunk's rows."""
        return F.log_softmax(F.linear(self.hidden_ND[chunk], self.weight_VD), dim=1, dtype=self.exact)

    def add(self, chunk: slice, grad_CV: Tensor) -> None:
        """Take the gradient of the chunk's logits."""
        if self.dtype is self.exact:
            torch.mm(grad_CV, self.weight_VD, out=self.hidden_grad_ND[chunk])
            self.weight_grad_VD.addmm_(grad_CV.t(), self.hidden_ND[chunk])
            return
        grad_CV = grad_CV.to(self.dtype)
        torch.mm(grad_CV, self.weight_VD, out=self.hidden_grad_ND[chunk])
        self.weight_grad_VD += grad_CV.t() @ self.hidden_ND[chunk]


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
        with_gradient = any(ctx.needs_input_grad)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            parts = _Gradients(hidden_ND, weight_VD, dtype)
            nll = uniform = hidden_ND.new_zeros((), dtype=parts.exact)
            for start in range(0, len(labels_N), parts.rows):
                chunk = slice(start, start + parts.rows)
                log_probs_CV, label_C1 = parts.log_probs(chunk), labels_N[chunk, None]
                label_log_probs_C1 = log_probs_CV.gather(1, label_C1)
                nll = nll - label_log_probs_C1.sum()
                uniform = uniform - log_probs_CV.sum()
                if with_gradient:
                    grad_CV = log_probs_CV.exp_().sub_(label_smoothing / vocabulary)
                    grad_CV.scatter_add_(1, label_C1, torch.full_like(label_log_probs_C1, label_smoothing - 1.0))
                    parts.add(chunk, grad_CV)
        ctx.save_for_backward(parts.hidden_grad_ND, parts.weight_grad_VD)
        ctx.mark_non_differentiable(nll)
        return (1.0 - label_smoothing) * nll + label_smoothing / vocabulary * uniform, nll

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        hidden_grad_ND, weight_grad_VD = ctx.saved_tensors
        return hidden_grad_ND * loss_grad, weight_grad_VD * loss_grad, None, None, None


class _ProjectedRDrop(torch.autograd.Function):
    """As above for two passes with distributions p and q. With a = KL(p||q), b = KL(q||p), r = log p - log q:

    d (a + b) / d logits_p = p (r - a) + p - q, and the other way round with -r and b for q.
    """

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
            parts = _Gradients(hidden_2ND, weight_VD, dtype)
            nll = uniform = divergence = hidden_2ND.new_zeros((), dtype=parts.exact)
            for start in range(0, count, parts.rows):
                end = min(start + parts.rows, count)
                chunks, label_C1 = (slice(start, end), slice(count + start, count + end)), labels_N[start:end, None]
                logs = [parts.log_probs(chunk) for chunk in chunks]
                probs = [log_CV.exp() for log_CV in logs]
                for first, second in ((0, 1), (1, 0)):
                    log_CV, ratio_CV = logs[first], logs[first] - logs[second]
                    divergence_C1 = (probs[first] * ratio_CV).sum(dim=1, keepdim=True)
                    divergence = divergence + divergence_C1.sum()
                    nll = nll - log_CV.gather(1, label_C1).sum() / 2
                    uniform = uniform - log_CV.sum() / 2
                    target_CV = torch.full_like(log_CV, label_smoothing / vocabulary)
                    target_CV.scatter_add_(1, label_C1, torch.full_like(divergence_C1, 1.0 - label_smoothing))
                    pull_CV = probs[first] * (ratio_CV - divergence_C1 + 1.0) - probs[second]
                    parts.add(chunks[first], (probs[first] - target_CV) / 2 + alpha / 4 * pull_CV)
        ctx.save_for_backward(parts.hidden_grad_ND, parts.weight_grad_VD)
        ctx.mark_non_differentiable(nll)
        smoothed = (1.0 - label_smoothing) * nll + label_smoothing / vocabulary * uniform
        return smoothed + alpha / 4 * divergence, nll

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        hidden_grad_ND, weight_grad_VD = ctx.saved_tensors
        return hidden_grad_ND * loss_grad, weight_grad_VD * loss_grad, None, None, None, None
