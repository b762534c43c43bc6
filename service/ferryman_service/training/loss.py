"""Label-smoothed cross-entropy over a large vocabulary (Szegedy et al., 2016, section 7; PyTorch's convention).

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
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return the sums over N of the smoothed loss and of the negative log-likelihood (not differentiable), in nats.

    The logits are hidden_ND @ weight_VD.T. They are never all in memory: chunk by chunk they become log-probabilities
    and then, in place, their own gradient, so that a chunk stays in the cache and nothing is computed twice.
    """
    loss, nll = _ProjectedCrossEntropy.apply(hidden_ND, weight_VD, labels_N, label_smoothing)  # type: ignore[no-untyped-call]
    return loss, nll


class _ProjectedCrossEntropy(torch.autograd.Function):
    """The gradients are ready after the forward pass: d loss / d logits = softmax(logits) - target distribution."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch's context has no public type)
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        vocabulary = weight_VD.shape[0]
        rows = max(1, _CHUNK_ELEMENTS[hidden_ND.device.type] // vocabulary)
        with_gradient = any(ctx.needs_input_grad)
        hidden_grad_ND = torch.empty_like(hidden_ND)
        weight_grad_VD = torch.zeros_like(weight_VD)
        nll, uniform = hidden_ND.new_zeros(()), hidden_ND.new_zeros(())
        per_chunk = (torch.split(tensor, rows) for tensor in (hidden_ND, labels_N[:, None], hidden_grad_ND))
        for hidden_CD, label_C1, hidden_grad_CD in zip(*per_chunk, strict=True):
            log_probs_CV = F.log_softmax(F.linear(hidden_CD, weight_VD), dim=1)
            label_log_probs_C1 = log_probs_CV.gather(1, label_C1)
            nll -= label_log_probs_C1.sum()
            uniform -= log_probs_CV.sum()
            if with_gradient:
                grad_CV = log_probs_CV.exp_().sub_(label_smoothing / vocabulary)
                grad_CV.scatter_add_(1, label_C1, torch.full_like(label_log_probs_C1, label_smoothing - 1.0))
                torch.mm(grad_CV, weight_VD, out=hidden_grad_CD)
                weight_grad_VD.addmm_(grad_CV.t(), hidden_CD)
        ctx.save_for_backward(hidden_grad_ND, weight_grad_VD)
        ctx.mark_non_differentiable(nll)
        return (1.0 - label_smoothing) * nll + label_smoothing / vocabulary * uniform, nll

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        hidden_grad_ND, weight_grad_VD = ctx.saved_tensors
        return hidden_grad_ND * loss_grad, weight_grad_VD * loss_grad, None, None
