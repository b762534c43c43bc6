import math

import pytest
import torch
import torch.nn.functional as F

from ferryman_service.training import loss as loss_module
from ferryman_service.training.loss import smoothed_cross_entropy


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
def test_it_is_torchs_loss_and_gradient_in_any_chunks(label_smoothing, chunk_elements, monkeypatch):
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


def test_it_works_without_gradients():
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
