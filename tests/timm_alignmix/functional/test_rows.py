"""The same losses as rows for a plain soft-target cross-entropy, with timm's criterion as the judge."""
import pytest
import torch
from timm.loss import SoftTargetCrossEntropy

from timm_alignmix.functional import (
    align,
    align_to,
    dense_multimix_loss,
    dense_multimix_rows,
    soft_target,
    soft_target_cross_entropy,
)

from .test_losses import EXACT, TARGETS, classify, dense_case, zero_column, zero_position
from .test_transport import features


@pytest.mark.parametrize('kind', TARGETS)
@pytest.mark.parametrize('smoothing', (0.0, 0.1))
@pytest.mark.parametrize('m', (5, 2))
def test_mean_over_rows_is_the_loss(m, smoothing, kind):
    (Z, W, b), target, weights_RNB, attention_BR = dense_case(m=m, kind=kind)
    attention_BR.requires_grad_()
    inputs = (Z, W, b, attention_BR)
    rows, targets = dense_multimix_rows(classify(Z, W, b), target, weights_RNB, attention_BR, smoothing=smoothing)
    assert rows.shape == targets.shape == (6 * 7, 4)
    loss = dense_multimix_loss(
        classify(Z, W, b), target, weights_RNB, attention_BR, smoothing=smoothing, attention_grad=True)
    criterion = SoftTargetCrossEntropy()(rows, targets)
    torch.testing.assert_close(criterion, loss, **EXACT)
    for got, want in zip(torch.autograd.grad(criterion, inputs), torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def nowhere(attention_BR, weights_RNB):
    attention_BR.zero_()


def attended_but_not_drawn(attention_BR, weights_RNB):
    """Only example 0 has attention at position 1, and no vector there has weight on it."""
    attention_BR[1:, 1] = 0
    weights_RNB[1] = torch.nn.functional.one_hot(torch.tensor([1, 2, 3, 4, 1, 2, 3]), 5)


@pytest.mark.parametrize('empty', (None, zero_column, zero_position, nowhere, attended_but_not_drawn))
def test_rows_and_loss_agree_where_attention_is_missing(empty):
    (Z, W, b), target, weights_RNB, attention_BR = dense_case(seed=1)
    if empty is None:
        attention_BR = None
    else:
        empty(attention_BR, weights_RNB)
    loss = dense_multimix_loss(classify(Z, W, b), target, weights_RNB, attention_BR)
    criterion = SoftTargetCrossEntropy()(*dense_multimix_rows(classify(Z, W, b), target, weights_RNB, attention_BR))
    torch.testing.assert_close(criterion, loss, **EXACT)
    got, = torch.autograd.grad(criterion, Z)
    torch.testing.assert_close(got, torch.autograd.grad(loss, Z)[0], **EXACT)


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
def test_rows_compute_in_float32_at_least(dtype):
    (Z, W, b), target, weights_RNB, attention_BR = dense_case(seed=2)
    logits_BRC = classify(Z, W, b).detach().to(dtype)
    with torch.autocast('cpu', torch.bfloat16):
        rows, targets = dense_multimix_rows(logits_BRC, target, weights_RNB.float(), attention_BR.to(dtype))
    assert rows.dtype == targets.dtype == torch.float32
    expected = dense_multimix_rows(logits_BRC.double(), target, weights_RNB, attention_BR.to(dtype).double())
    torch.testing.assert_close(rows.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(targets.double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('autocast', (False, True))
def test_soft_target_cross_entropy_is_timms(autocast):
    logits_BC = 5 * torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target_BC = soft_target(torch.tensor([0, 4, 2, 2, 1, 3]), 5, smoothing=0.1)
    expected = SoftTargetCrossEntropy()(logits_BC, target_BC.double())
    torch.testing.assert_close(soft_target_cross_entropy(logits_BC, target_BC), expected, **EXACT)
    low = logits_BC.to(torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        loss = soft_target_cross_entropy(low, target_BC)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(SoftTargetCrossEntropy()(low.double(), target_BC.double()).item(), rel=1e-6)


def test_align_to_is_one_side_of_align():
    a_BDR, b_BDR = features(scale=2.0), features(seed=1, scale=2.0)
    for kept_is, sides in (('kept', ('kept', 'kept')), ('columns', ('moved', 'kept')), ('rows', ('kept', 'moved'))):
        ab_BDR, ba_BDR = align(a_BDR, b_BDR, final_marginal=kept_is)
        torch.testing.assert_close(align_to(a_BDR, b_BDR, final_marginal=sides[0]), ab_BDR, **EXACT)
        torch.testing.assert_close(align_to(b_BDR, a_BDR, final_marginal=sides[1]), ba_BDR, **EXACT)
    with pytest.raises(ValueError, match='columns'):
        align_to(a_BDR, b_BDR, final_marginal='columns')
