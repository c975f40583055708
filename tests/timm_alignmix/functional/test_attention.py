"""Attention over positions against [M] (9) written with loops."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_alignmix.functional import attention_map

from . import textbook

EXACT = {'rtol': 1e-10, 'atol': 1e-12}
LABELS = torch.tensor([2, 0, 2, 1, 4])
SOFT = torch.softmax(torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 1)


def features(B=5, D=4, R=7, seed=0):
    return torch.randn(B, D, R, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize('normalize', ('relu', 'softmax'))
def test_gap(normalize):
    feat_BDR = features()
    attention_BR = attention_map(feat_BDR, by='gap', normalize=normalize)
    expected = textbook.attention_map(feat_BDR, feat_BDR.sum(2) / feat_BDR.shape[2], normalize)
    torch.testing.assert_close(attention_BR, expected, **EXACT)
    upstream = features(seed=3)[:, 0]
    got, = torch.autograd.grad((attention_BR * upstream).sum(), feat_BDR)
    want, = torch.autograd.grad((expected * upstream).sum(), feat_BDR)
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize('labels', (LABELS, SOFT), ids=('hard', 'soft'))
@pytest.mark.parametrize('normalize', ('relu', 'softmax'))
def test_cam_takes_the_classifier_column_of_the_label(normalize, labels):
    feat_BDR = features()
    weight_CD = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    attention_BR = attention_map(feat_BDR, by='cam', normalize=normalize, weight=weight_CD, labels=labels)
    Y_BC = textbook.one_hot_targets(labels, 6)
    u_BD = torch.stack([sum(Y_BC[i, c] * weight_CD[c] for c in range(6)) for i in range(5)])
    torch.testing.assert_close(attention_BR, textbook.attention_map(feat_BDR, u_BD, normalize), **EXACT)


@pytest.mark.parametrize('normalize', ('relu', 'softmax'))
def test_none_is_uniform(normalize):
    expected = textbook.attention_map(features(), None, normalize)
    torch.testing.assert_close(attention_map(features(), by='none', normalize=normalize), expected, **EXACT)


def test_rows_sum_to_one_or_are_zero():
    feat_BDR = features(B=3).detach()
    weight_CD = -feat_BDR[0].sum(1, keepdim=True).T  # class 0 dislikes where example 0 points to
    feat_BDR[0] = feat_BDR[0].mean(1, keepdim=True)  # so every position of example 0 is negative
    feat_BDR[1] = 0
    feat_BDR.requires_grad_()
    attention_BR = attention_map(
        feat_BDR, by='cam', normalize='relu', weight=weight_CD, labels=torch.zeros(3, dtype=torch.long))
    attention_BR.pow(2).sum().backward()
    assert torch.equal(attention_BR[:2], torch.zeros_like(attention_BR[:2]))
    torch.testing.assert_close(attention_BR[2].sum(), torch.tensor(1.0, dtype=torch.float64), **EXACT)
    assert feat_BDR.grad.isfinite().all()


@pytest.mark.parametrize('autocast', (False, True))
@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize('normalize', ('relu', 'softmax'))
def test_computes_in_float32_at_least(normalize, dtype, autocast):
    """float16 features of norm 300 overflow in their own precision; bfloat16 rounds logits of 30 by 0.1."""
    scale = 30.0 if normalize == 'relu' else 1.0
    feat_BDR = (scale * features(D=100)).detach().to(dtype)
    exact = feat_BDR.double()
    expected = textbook.attention_map(exact, exact.mean(2), normalize)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        attention_BR = attention_map(feat_BDR, by='gap', normalize=normalize)
    assert attention_BR.dtype == torch.float32
    torch.testing.assert_close(attention_BR.double(), expected, rtol=1e-4, atol=1e-5)


def test_tiny_features_are_normalised_too():
    """Nothing may be added to the l1 norm: features of 1e-6 give dot products of 1e-12."""
    feat_BDR = features().detach().float()
    torch.testing.assert_close(attention_map(1e-6 * feat_BDR), attention_map(feat_BDR), rtol=1e-4, atol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.sampled_from(('relu', 'softmax')), st.integers(0, 9))
def test_any_shape(B, D, R, normalize, seed):
    feat_BDR = features(B, D, R, seed)
    expected = textbook.attention_map(feat_BDR, feat_BDR.mean(2), normalize)
    torch.testing.assert_close(attention_map(feat_BDR, by='gap', normalize=normalize), expected, **EXACT)


def test_bad_arguments():
    feat_BDR, weight_CD = features().detach(), torch.ones(6, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match='cams'):
        attention_map(feat_BDR, by='cams')
    with pytest.raises(ValueError, match='l2'):
        attention_map(feat_BDR, normalize='l2')
    with pytest.raises(ValueError, match='5, 4'):
        attention_map(feat_BDR[:, :, 0])
    with pytest.raises(ValueError):  # cam needs a classifier and labels
        attention_map(feat_BDR, by='cam')
    with pytest.raises(ValueError, match='6, 3'):
        attention_map(feat_BDR, by='cam', weight=weight_CD[:, :3], labels=LABELS)
    with pytest.raises(ValueError, match='3'):
        attention_map(feat_BDR, by='cam', weight=weight_CD, labels=LABELS[:3])
