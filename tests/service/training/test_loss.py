import math

import pytest
import torch
import torch.nn.functional as F

from ferryman_service.training import loss as loss_module
from ferryman_service.training.loss import r_drop_loss, smoothed_cross_entropy


def tensors(tokens=37, d_model=8, vocabulary=50):
    generator = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn(tokens, d_model, generator=generator, requires_grad=True)
    weight_VD = torch.randn(vocabulary, d_model, generator=generator, requires_grad=True)
    labels_N = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden_ND, weight_VD, labels_N


def test_of_ten_subwords_the_correct_one_gets_091():
    target = torch.full((10,), 0.01)
    target[3] = 0.91
    hidden_ND, weight_VD, _ = tensors(1, 10, 10)
    log_probs = F.log_softmax(hidden_ND @ weight_VD.t(), dim=1)[0]
    loss, nll = smoothed_cross_entropy(hidden_ND, weight_VD, torch.tensor([3]), 0.1)
    assert loss.item() == pytest.approx(-(target * log_probs).sum().item(), rel=1e-5)
    assert nll.item() == pytest.approx(-log_probs[3].item(), rel=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("chunk_elements", [1, 500, 10**6])
def test_chunked_loss_and_gradient_equal_torchs(label_smoothing, chunk_elements, monkeypatch):
    monkeypatch.setitem(loss_module._CHUNK_ELEMENTS, "cpu", chunk_elements)
    hidden_ND, weight_VD, labels_N = tensors()
    loss, nll = smoothed_cross_entropy(hidden_ND, weight_VD, labels_N, label_smoothing)
    (3.0 * loss).backward()
    gradients = hidden_ND.grad.clone(), weight_VD.grad.clone()
    hidden_ND.grad = weight_VD.grad = None
    logits_NV = hidden_ND @ weight_VD.t()
    expected = F.cross_entropy(logits_NV, labels_N, label_smoothing=label_smoothing, reduction="sum")
    (3.0 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(nll, F.cross_entropy(logits_NV, labels_N, reduction="sum"))
    torch.testing.assert_close(gradients, (hidden_ND.grad, weight_VD.grad))


def test_loss_works_without_gradients():
    hidden_ND, weight_VD, labels_N = tensors()
    with torch.inference_mode():
        loss, nll = smoothed_cross_entropy(hidden_ND, weight_VD, labels_N, 0.1)
    assert not loss.requires_grad
    assert math.isfinite(nll.item())


def test_an_infinite_logit_shows():
    hidden_ND, weight_VD, labels_N = tensors()
    with torch.no_grad():
        weight_VD[0, 0] = math.inf
    assert not math.isfinite(smoothed_cross_entropy(hidden_ND, weight_VD, labels_N, 0.1)[0].item())


def r_drop_formula(hidden_2ND, weight_VD, labels_N, label_smoothing, alpha):
    """What the docstring says, with nothing but torch's own functions; and the negative log-likelihood."""
    p_NV, q_NV = (hidden_ND @ weight_VD.t() for hidden_ND in hidden_2ND.chunk(2))
    cross_entropies = [
        F.cross_entropy(logits_NV, labels_N, label_smoothing=label_smoothing, reduction="sum")
        for logits_NV in (p_NV, q_NV)
    ]
    log_p_NV, log_q_NV = p_NV.log_softmax(dim=1), q_NV.log_softmax(dim=1)
    divergence = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum() + (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum()
    nll = sum(F.cross_entropy(logits_NV, labels_N, reduction="sum") for logits_NV in (p_NV, q_NV)) / 2
    return sum(cross_entropies) / 2 + alpha / 4 * divergence, nll


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("rows", [1, 5, 8, 37, 1000])  # of 37: the last chunk has 1, 2, 5 or all of its rows
def test_r_drop_is_its_formula_and_gradient_in_any_chunks(label_smoothing, alpha, rows, monkeypatch):
    monkeypatch.setitem(loss_module._CHUNK_ELEMENTS, "cpu", 50 * rows)
    hidden_2ND, weight_VD, labels_N = (
        tensor.detach().double() if tensor.is_floating_point() else tensor for tensor in tensors(tokens=74)
    )
    labels_N = labels_N[:37]
    hidden_2ND.requires_grad_()
    weight_VD.requires_grad_()
    loss, nll = r_drop_loss(hidden_2ND, weight_VD, labels_N, label_smoothing, alpha)
    (3.0 * loss).backward()
    gradients = hidden_2ND.grad.clone(), weight_VD.grad.clone()
    hidden_2ND.grad = weight_VD.grad = None
    expected, expected_nll = r_drop_formula(hidden_2ND, weight_VD, labels_N, label_smoothing, alpha)
    (3.0 * expected).backward()
    assert loss.dtype is torch.float64
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(nll, expected_nll, atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(gradients, (hidden_2ND.grad, weight_VD.grad), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_r_drop_in_less_precision_is_nearly_the_same(dtype):
    hidden_2ND, weight_VD, labels_N = tensors(tokens=74)
    labels_N = labels_N[:37]
    loss, _ = r_drop_loss(hidden_2ND, weight_VD, labels_N, 0.1, 5.0, dtype)
    loss.backward()
    gradients = hidden_2ND.grad.clone(), weight_VD.grad.clone()
    hidden_2ND.grad = weight_VD.grad = None
    expected, _ = r_drop_formula(hidden_2ND, weight_VD, labels_N, 0.1, 5.0)
    expected.backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, theirs in zip(gradients, (hidden_2ND.grad, weight_VD.grad), strict=True):
        assert ours.dtype is torch.float32
        assert ((ours - theirs).norm() / theirs.norm()).item() < tolerance
