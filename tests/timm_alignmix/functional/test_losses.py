"""Closed-form losses against the textbook forms: value and every gradient, in float64 and below."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.mixup import mixup_target

from timm_alignmix.functional import check_values, dense_multimix_loss, multimix_loss, soft_target

from . import textbook
from .memory import largest_allocation

EXACT = {'rtol': 1e-10, 'atol': 1e-12}
TARGETS = ('hard', 'soft')


def dirichlet_rows(rng, count, batch, m=None):
    """(count, batch) rows on random m-subsets, drawn by numpy."""
    rows = np.zeros((count, batch))
    for row in rows:
        row[rng.permutation(batch)[:m]] = rng.dirichlet(np.full(m or batch, rng.uniform(0.5, 2.0)))
    return torch.from_numpy(rows)


def draw_target(rng, kind, batch, num_classes):
    if kind == 'hard':
        return torch.from_numpy(rng.integers(0, num_classes, batch))
    return torch.from_numpy(rng.dirichlet(np.ones(num_classes), batch))


def dense_case(B=5, C=4, D=3, R=6, N=7, m=None, seed=0, kind='hard'):
    """Float64 features, classifier, target, weights and un-normalised positive attention."""
    rng = np.random.default_rng(seed)
    parameters = [torch.from_numpy(rng.normal(size=shape)).requires_grad_() for shape in ((B, D, R), (C, D), (C,))]
    target = draw_target(rng, kind, B, C)
    weights_RNB = dirichlet_rows(rng, R * N, B, m).reshape(R, N, B)
    attention_BR = torch.from_numpy(rng.uniform(0.05, 3.0, (B, R)))
    return parameters, target, weights_RNB, attention_BR


def classify(Z_BDR, W_CD, b_C):
    return torch.einsum('bdr,cd->brc', Z_BDR, W_CD) + b_C


def dense_textbook(parameters, target, weights_RNB, attention_BR, smoothing=0.0):
    Z, W, b = parameters
    Y = textbook.one_hot_targets(target, W.shape[0], smoothing)
    return textbook.dense_multimix_loss(Z, W, b, Y, weights_RNB, attention_BR)


def assert_dense_matches(parameters, target, weights_RNB, attention_BR, smoothing=0.0, chunk_size=None):
    """Value, and gradients with respect to features, classifier, bias and attention, equal the textbook's."""
    attention_BR = attention_BR.clone().requires_grad_()
    inputs = [*parameters, attention_BR]
    expected = dense_textbook(parameters, target, weights_RNB, attention_BR, smoothing)
    actual = dense_multimix_loss(
        classify(*parameters), target, weights_RNB, attention_BR,
        smoothing=smoothing, attention_grad=True, chunk_size=chunk_size,
    )
    assert actual.dtype == torch.float64 and actual.shape == ()
    torch.testing.assert_close(actual, expected, **EXACT)
    expected_grads = torch.autograd.grad(expected, inputs, allow_unused=True)
    actual_grads = torch.autograd.grad(actual, inputs, allow_unused=True)
    for x, want, got in zip(inputs, expected_grads, actual_grads, strict=True):
        zero = torch.zeros_like(x)
        torch.testing.assert_close(zero if got is None else got, zero if want is None else want, **EXACT)


# ---------------------------------------------------------------------------------------------------------- MultiMix


@pytest.mark.parametrize('kind', TARGETS)
@pytest.mark.parametrize('smoothing', (0.0, 0.1))
@pytest.mark.parametrize('B, N, m', ((5, 9, 5), (5, 2, 3), (4, 6, 1), (1, 3, 1), (7, 1, 7)))
def test_multimix_value_and_gradients(B, N, m, smoothing, kind):
    rng = np.random.default_rng(B + 10 * N)
    C, D = 4, 3
    Z_BD, W, b = (torch.from_numpy(rng.normal(size=shape)).requires_grad_() for shape in ((B, D), (C, D), (C,)))
    target, weights_NB = draw_target(rng, kind, B, C), dirichlet_rows(rng, N, B, m)
    Y = textbook.one_hot_targets(target, C, smoothing)

    expected = textbook.multimix_loss(Z_BD.T, W, b, Y, weights_NB)
    actual = multimix_loss(Z_BD @ W.T + b, target, weights_NB, smoothing=smoothing)

    assert actual.dtype == torch.float64 and actual.shape == ()
    torch.testing.assert_close(actual, expected, **EXACT)
    expected_grads = torch.autograd.grad(expected, (Z_BD, W, b))
    for got, want in zip(torch.autograd.grad(actual, (Z_BD, W, b)), expected_grads, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize('smoothing', (0.0, 0.1))
def test_multimix_with_one_hot_weights_is_the_clean_cross_entropy(smoothing):
    logits_BC = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 4, 2, 2, 1, 3])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    actual = multimix_loss(logits_BC, target, torch.eye(6, dtype=torch.float64)[order], smoothing=smoothing)
    torch.testing.assert_close(actual, F.cross_entropy(logits_BC, target, label_smoothing=smoothing), **EXACT)


def test_multimix_gradcheck():
    rng = np.random.default_rng(3)
    logits_BC = torch.from_numpy(rng.normal(size=(3, 4))).requires_grad_()
    target, weights_NB = draw_target(rng, 'hard', 3, 4), dirichlet_rows(rng, 5, 3)
    assert torch.autograd.gradcheck(lambda x: multimix_loss(x, target, weights_NB, smoothing=0.1), logits_BC)


def test_multimix_scales_the_upstream_gradient_and_differentiates_twice():
    rng = np.random.default_rng(4)
    logits_BC = torch.from_numpy(rng.normal(size=(3, 4))).requires_grad_()
    loss = multimix_loss(logits_BC, draw_target(rng, 'hard', 3, 4), dirichlet_rows(rng, 5, 3))
    once, = torch.autograd.grad(loss, logits_BC, retain_graph=True)
    scaled, = torch.autograd.grad(-2.5 * loss, logits_BC, retain_graph=True)
    again, = torch.autograd.grad(loss, logits_BC)
    torch.testing.assert_close(scaled, -2.5 * once, **EXACT)
    assert torch.equal(once, again)


# ---------------------------------------------------------------------------------------------------- Dense MultiMix


@pytest.mark.parametrize('kind', TARGETS)
@pytest.mark.parametrize('smoothing', (0.0, 0.1))
@pytest.mark.parametrize('B, R, N, m', ((5, 6, 7, 5), (4, 3, 5, 2), (3, 4, 2, 1), (1, 5, 3, 1), (7, 1, 6, 7)))
def test_dense_value_and_gradients(B, R, N, m, smoothing, kind):
    assert_dense_matches(*dense_case(B=B, R=R, N=N, m=m, kind=kind), smoothing=smoothing)


@pytest.mark.parametrize('chunk_size', (1, 2, 4, 6, 11))
@pytest.mark.parametrize('kind', TARGETS)
def test_dense_chunk_size_changes_nothing(chunk_size, kind):
    case = dense_case(kind=kind, seed=5)
    case[3][:, 2] = 0  # a chunk may hold nothing but a position without attention
    assert_dense_matches(*case, smoothing=0.1, chunk_size=chunk_size)


def test_dense_without_attention_is_uniform_attention():
    parameters, target, weights_RNB, attention_BR = dense_case(seed=6)
    expected = dense_textbook(parameters, target, weights_RNB, torch.ones_like(attention_BR))
    actual = dense_multimix_loss(classify(*parameters), target, weights_RNB)
    torch.testing.assert_close(actual, expected, **EXACT)
    for got, want in zip(
        torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters), strict=True,
    ):
        torch.testing.assert_close(got, want, **EXACT)


def test_dense_with_one_hot_weights_is_the_attended_clean_cross_entropy():
    """One vector per example, all its mass there: (14) is the attention-weighted mean of the clean losses."""
    parameters, target, _, attention_BR = dense_case(seed=7)
    logits_BRC = classify(*parameters)
    B, R, C = logits_BRC.shape
    clean_BR = F.cross_entropy(logits_BRC.flatten(0, 1), target.repeat_interleave(R), reduction='none').view(B, R)
    eye_RBB = torch.eye(B, dtype=torch.float64).expand(R, B, B)
    expected = ((attention_BR * clean_BR).sum(0) / attention_BR.sum(0)).mean()
    torch.testing.assert_close(dense_multimix_loss(logits_BRC, target, eye_RBB, attention_BR), expected, **EXACT)
    torch.testing.assert_close(dense_multimix_loss(logits_BRC, target, eye_RBB), clean_BR.mean(), **EXACT)


def test_dense_on_one_position_with_uniform_attention_is_multimix():
    parameters, target, weights_RNB, _ = dense_case(R=1, seed=8)
    logits_BRC = classify(*parameters)
    expected = multimix_loss(logits_BRC[:, 0], target, weights_RNB[0])
    torch.testing.assert_close(dense_multimix_loss(logits_BRC, target, weights_RNB), expected, **EXACT)


def zero_column(attention_BR, weights_RNB):
    attention_BR[2] = 0
    weights_RNB[:, 1] = F.one_hot(torch.tensor(2), weights_RNB.shape[2])  # vectors that draw on example 2 alone


def zero_position(attention_BR, weights_RNB):
    attention_BR[:, 3] = 0


def zero_mixed(attention_BR, weights_RNB):
    zero_column(attention_BR, weights_RNB)
    attention_BR[:, 0] = 0
    attention_BR[:, -1] = 0
    attention_BR[1, 1] = 0


@pytest.mark.parametrize('chunk_size', (None, 1, 2))
@pytest.mark.parametrize('empty', (zero_column, zero_position, zero_mixed))
def test_dense_places_without_attention_contribute_nothing(empty, chunk_size):
    parameters, target, weights_RNB, attention_BR = dense_case(seed=9)
    empty(attention_BR, weights_RNB)
    assert_dense_matches(parameters, target, weights_RNB, attention_BR, chunk_size=chunk_size)


def test_dense_mean_is_over_attended_positions_only():
    """Appending positions without attention changes nothing: not the value, not the gradient of the others."""
    (Z, W, b), target, weights_RNB, attention_BR = dense_case(R=3, seed=10)
    padded_Z = torch.cat([Z.detach(), torch.randn(5, 3, 4, dtype=torch.float64)], 2).requires_grad_()
    padded_weights = torch.cat([weights_RNB, weights_RNB, weights_RNB[:1]])
    padded_attention = torch.cat([attention_BR, attention_BR.new_zeros(5, 4)], 1)
    loss = dense_multimix_loss(classify(Z, W, b), target, weights_RNB, attention_BR)
    padded = dense_multimix_loss(classify(padded_Z, W, b), target, padded_weights, padded_attention)
    torch.testing.assert_close(padded, loss, **EXACT)
    grad, = torch.autograd.grad(loss, Z)
    padded_grad, = torch.autograd.grad(padded, padded_Z)
    torch.testing.assert_close(padded_grad[:, :, :3], grad, **EXACT)
    assert padded_grad[:, :, 3:].abs().max() == 0


@pytest.mark.parametrize('attention_grad', (False, True))
@pytest.mark.parametrize('dtype', (torch.float32, torch.float64, torch.bfloat16))
def test_dense_with_no_attention_anywhere_is_zero(dtype, attention_grad):
    (Z, W, b), target, weights_RNB, attention_BR = dense_case(seed=11)
    logits_BRC = classify(Z, W, b).detach().to(dtype).requires_grad_()
    attention_BR = torch.zeros_like(attention_BR).to(dtype).requires_grad_(attention_grad)
    loss = dense_multimix_loss(logits_BRC, target, weights_RNB, attention_BR, attention_grad=attention_grad)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(logits_BRC.grad, torch.zeros_like(logits_BRC))
    if attention_grad:
        assert torch.equal(attention_BR.grad, torch.zeros_like(attention_BR))


@pytest.mark.parametrize('dtype, scale', ((torch.float32, 1e-15), (torch.float32, 1e15), (torch.float64, 1e-100)))
def test_dense_depends_on_no_overall_scale_of_the_attention(dtype, scale):
    """Softmax over many positions leaves tiny attention: nothing may be added to the normaliser."""
    (Z, W, b), target, weights_RNB, attention_BR = dense_case(seed=12)
    logits_BRC = classify(Z, W, b).detach().to(dtype).requires_grad_()
    tolerance = EXACT if dtype == torch.float64 else {'rtol': 1e-5, 'atol': 1e-7}
    losses = [dense_multimix_loss(logits_BRC, target, weights_RNB, (attention_BR * c).to(dtype)) for c in (1.0, scale)]
    grads = [torch.autograd.grad(loss, logits_BRC)[0] for loss in losses]
    torch.testing.assert_close(losses[1], losses[0], **tolerance)
    torch.testing.assert_close(grads[1], grads[0], **tolerance)


def test_dense_attention_gets_a_gradient_only_when_asked():
    (Z, W, b), target, weights_RNB, attention_BR = dense_case(seed=13)
    logits_BRC = classify(Z, W, b)
    attention_BR.requires_grad_()
    loss = dense_multimix_loss(logits_BRC, target, weights_RNB, attention_BR)
    kept = torch.autograd.grad(loss, Z, retain_graph=True)[0]
    assert torch.autograd.grad(loss, attention_BR, allow_unused=True)[0] is None
    asked = dense_multimix_loss(logits_BRC, target, weights_RNB, attention_BR, attention_grad=True)
    assert torch.autograd.grad(asked, attention_BR, retain_graph=True)[0].abs().max() > 1e-3
    torch.testing.assert_close(torch.autograd.grad(asked, Z)[0], kept, **EXACT)


def test_dense_attention_gradient_reaches_the_features_it_came_from():
    """attention = f(features): asked, both paths count, as in the textbook; not asked, only the one through logits."""
    (Z, W, b), target, weights_RNB, _ = dense_case(seed=14)
    for attention_grad in (True, False):
        expected_attention = Z.pow(2).sum(1) if attention_grad else Z.detach().pow(2).sum(1)
        expected = dense_textbook((Z, W, b), target, weights_RNB, expected_attention)
        actual = dense_multimix_loss(
            classify(Z, W, b), target, weights_RNB, Z.pow(2).sum(1), attention_grad=attention_grad, chunk_size=2,
        )
        for got, want in zip(
            torch.autograd.grad(actual, (Z, W, b)), torch.autograd.grad(expected, (Z, W, b)), strict=True,
        ):
            torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize('kind', TARGETS)
def test_dense_gradcheck(kind):
    parameters, target, weights_RNB, attention_BR = dense_case(B=3, C=3, R=2, N=4, seed=15, kind=kind)
    logits_BRC = classify(*parameters).detach().requires_grad_()

    def loss(logits_BRC, attention_BR):
        return dense_multimix_loss(
            logits_BRC, target, weights_RNB, attention_BR, smoothing=0.1, attention_grad=True, chunk_size=1,
        )

    assert torch.autograd.gradcheck(loss, (logits_BRC, attention_BR.requires_grad_()))


def test_dense_scales_the_upstream_gradient_and_differentiates_twice():
    (Z, W, b), target, weights_RNB, attention_BR = dense_case(seed=16)
    logits_BRC = classify(Z, W, b).detach().requires_grad_()
    attention_BR.requires_grad_()
    loss = dense_multimix_loss(logits_BRC, target, weights_RNB, attention_BR, attention_grad=True)
    inputs = (logits_BRC, attention_BR)
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    scaled = torch.autograd.grad(-2.5 * loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    for x, y, z in zip(once, scaled, again, strict=True):
        torch.testing.assert_close(y, -2.5 * x, **EXACT)
        assert torch.equal(x, z)


def test_losses_without_gradients_have_the_same_value():
    (Z, W, b), target, weights_RNB, attention_BR = dense_case(seed=17)
    logits_BRC = classify(Z, W, b)
    with torch.no_grad():
        dense = dense_multimix_loss(logits_BRC, target, weights_RNB, attention_BR)
        multi = multimix_loss(logits_BRC[:, 0], target, weights_RNB[0])
    torch.testing.assert_close(
        dense, dense_multimix_loss(logits_BRC, target, weights_RNB, attention_BR).detach(), **EXACT)
    torch.testing.assert_close(multi, multimix_loss(logits_BRC[:, 0], target, weights_RNB[0]).detach(), **EXACT)


def test_dense_chunks_bound_the_memory():
    """No tensor of R * N * C, forward or backward, when positions are taken one at a time."""
    B, R, N, C = 4, 16, 40, 24
    (Z, W, b), target, weights_RNB, attention_BR = dense_case(B=B, R=R, N=N, C=C, D=3, seed=18)
    logits_BRC = classify(Z, W, b).detach().requires_grad_()
    arguments = (logits_BRC, target, weights_RNB, attention_BR)
    most = [
        largest_allocation(lambda size=size: dense_multimix_loss(*arguments, chunk_size=size).backward(), itemsize=8)
        for size in (1, R)
    ]
    assert most[0] <= max(N * C, B * R * C)
    assert most[1] >= R * N * C  # the measurement sees what is inside


# --------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize('autocast', (False, True))
@pytest.mark.parametrize('dtype, grad_tol', ((torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)))
def test_losses_compute_in_float32_at_least(dtype, grad_tol, autocast):
    """Low precision logits are exact inputs: the result is that of the same numbers in float64."""
    (Z, W, b), target, weights_RNB, attention_BR = dense_case(B=9, C=11, N=50, seed=19)
    low = (8 * classify(Z, W, b)).detach().to(dtype)
    weights_RNB, attention_BR = weights_RNB.float(), attention_BR.to(dtype)
    cases = (
        (low, lambda x, w: dense_multimix_loss(x, target, w(weights_RNB), w(attention_BR), smoothing=0.1)),
        (low[:, 0], lambda x, w: multimix_loss(x, target, w(weights_RNB[0]), smoothing=0.1)),
    )
    for logits, loss in cases:
        exact = logits.double().requires_grad_()
        expected = loss(exact, torch.Tensor.double)
        expected.backward()
        logits = logits.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            actual = loss(logits, lambda t: t)
            actual.backward()
        assert actual.dtype == torch.float32 and logits.grad.dtype == dtype
        assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
        error = (logits.grad.double() - exact.grad).abs().max()
        assert error <= grad_tol * exact.grad.abs().max()


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16, torch.float16))
def test_gradients_wait_in_the_type_of_the_logits(dtype):
    """Half the memory between forward and backward; a loss scaler still saves what float16 could not hold."""
    (Z, W, b), target, weights_RNB, _ = dense_case(B=8, C=40, R=50, seed=22)
    logits_BRC = classify(Z, W, b).detach().to(dtype)
    logits_BRC[:, :, 1:3] -= 9  # gradients of about 1e-8
    exact = logits_BRC.double().requires_grad_()
    dense_multimix_loss(exact, target % 3, weights_RNB).backward()
    logits_BRC.requires_grad_()
    loss = dense_multimix_loss(logits_BRC, target % 3, weights_RNB)
    assert loss.grad_fn.saved_tensors[0].dtype == dtype
    (2 ** 12 * loss).backward()
    torch.testing.assert_close(
        logits_BRC.grad.double() / 2 ** 12, exact.grad, rtol=3 * torch.finfo(dtype).eps, atol=1e-10)


@pytest.mark.parametrize('spread', (59.0, 61.0, 500.0))
@pytest.mark.parametrize('offset', (0.0, -300.0))
def test_losses_do_not_depend_on_how_peaks_are_taken(spread, offset):
    """Logits just close enough for one shift of a position, just not, and far apart; some examples far below others."""
    (Z, W, b), target, weights_RNB, attention_BR = dense_case(seed=21)
    logits_BRC = classify(Z, W, b).detach()
    logits_BRC[0] -= 10
    logits_BRC -= logits_BRC.amin((0, 2), keepdim=True)
    logits_BRC = offset + spread * logits_BRC / logits_BRC.amax((0, 2), keepdim=True)
    eye = torch.eye(logits_BRC.shape[2], dtype=torch.float64)
    zero = torch.zeros(len(eye), dtype=torch.float64)
    expected = dense_textbook((logits_BRC.transpose(1, 2), eye, zero), target, weights_RNB, attention_BR)
    actual = dense_multimix_loss(logits_BRC, target, weights_RNB, attention_BR)
    torch.testing.assert_close(actual, expected, **EXACT)
    low = dense_multimix_loss(logits_BRC.float(), target, weights_RNB.float(), attention_BR.float())
    assert low.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-4)


def test_losses_survive_huge_logits():
    target, weights_RNB = torch.tensor([0, 1, 2]), torch.full((2, 4, 3), 1 / 3)
    logits_BRC = torch.zeros(3, 2, 3)
    logits_BRC[:, :, 0] = 6e4
    for dtype in (torch.float16, torch.float32):
        x = logits_BRC.to(dtype).requires_grad_()
        loss = dense_multimix_loss(x, target, weights_RNB) + multimix_loss(x[:, 0], target, weights_RNB[0])
        loss.backward()
        assert loss.item() == pytest.approx(2 * 4e4, rel=1e-3)
        assert x.grad.isfinite().all()


def test_losses_leave_their_inputs_alone():
    (Z, W, b), target, weights_RNB, attention_BR = dense_case(seed=20, kind='soft')
    tensors = [classify(Z, W, b).detach().requires_grad_(), target, weights_RNB, attention_BR]
    before = [t.detach().clone() for t in tensors]
    dense_multimix_loss(*tensors, smoothing=0.1).backward()
    multimix_loss(tensors[0][:, 0], target, weights_RNB[0], smoothing=0.1).backward()
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


# ------------------------------------------------------------------------------------------------ shapes and targets


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_dense_any_shape(data):
    B, R, N = (data.draw(st.integers(1, top), label=name) for name, top in (('B', 7), ('R', 5), ('N', 6)))
    case = dense_case(
        B=B, C=data.draw(st.integers(1, 5)), D=data.draw(st.integers(1, 4)), R=R, N=N,
        m=data.draw(st.integers(1, B)), seed=data.draw(st.integers(0, 99)), kind=data.draw(st.sampled_from(TARGETS)),
    )
    dead = data.draw(st.lists(st.tuples(st.integers(0, B - 1), st.integers(0, R - 1)), max_size=B * R))
    for i, j in dead:
        case[3][i, j] = 0
    assert_dense_matches(
        *case,
        smoothing=data.draw(st.sampled_from((0.0, 0.1))),
        chunk_size=data.draw(st.sampled_from((None, 1, 2, 3))),
    )


@pytest.mark.parametrize('smoothing', (0.0, 0.1))
def test_soft_target_follows_timm(smoothing):
    target = torch.tensor([2, 0, 1, 2])
    expected = mixup_target(target, 3, lam=1.0, smoothing=smoothing)
    torch.testing.assert_close(soft_target(target, 3, smoothing=smoothing), expected, check_dtype=False)


@pytest.mark.parametrize('smoothing', (0.0, 0.1))
def test_soft_target_of_soft_rows(smoothing):
    rows_BC = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    actual = soft_target(rows_BC, 3, smoothing=smoothing)
    torch.testing.assert_close(actual, textbook.one_hot_targets(rows_BC, 3, smoothing), **EXACT)
    torch.testing.assert_close(actual.sum(1), torch.ones(2, dtype=torch.float64), **EXACT)


def ones(*shape):
    return torch.ones(shape)


LABELS = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize('arguments, shape', (
    ((ones(4, 7), LABELS, ones(5, 3)), '5, 3'),  # weights over another batch
    ((ones(4, 7), LABELS, ones(2, 5, 4)), '2, 5, 4'),  # dense weights
    ((ones(4, 6, 7), LABELS, ones(5, 4)), '4, 6, 7'),  # dense logits
    ((ones(4, 7), LABELS[:3], ones(5, 4)), '3'),  # too few labels
    ((ones(4, 7), ones(4, 6), ones(5, 4)), '4, 6'),  # soft targets of other classes
    ((ones(4, 7), ones(3, 7), ones(5, 4)), '3, 7'),  # soft targets of another batch
))
def test_multimix_refuses_bad_shapes(arguments, shape):
    with pytest.raises(ValueError, match=shape):
        multimix_loss(*arguments)


@pytest.mark.parametrize('arguments, shape', (
    ((ones(4, 6, 7), LABELS, ones(6, 5, 3)), '6, 5, 3'),  # weights over another batch
    ((ones(4, 6, 7), LABELS, ones(5, 5, 4)), '5, 5, 4'),  # weights for other positions
    ((ones(4, 6, 7), LABELS, ones(5, 4)), '5, 4'),  # weights without positions
    ((ones(4, 7), LABELS, ones(6, 5, 4)), '4, 7'),  # pooled logits
    ((ones(4, 6, 7), LABELS[:3], ones(6, 5, 4)), '3'),  # too few labels
    ((ones(4, 6, 7), ones(4, 6), ones(6, 5, 4)), '4, 6'),  # soft targets of other classes
    ((ones(4, 6, 7), LABELS, ones(6, 5, 4), ones(6, 4)), '6, 4'),  # attention transposed
    ((ones(4, 6, 7), LABELS, ones(6, 5, 4), ones(4)), '4'),  # attention without positions
))
def test_dense_refuses_bad_shapes(arguments, shape):
    with pytest.raises(ValueError, match=shape):
        dense_multimix_loss(*arguments)


def test_float_labels_are_refused():
    with pytest.raises(ValueError, match='4'):
        multimix_loss(ones(4, 7), ones(4), ones(5, 4))


@pytest.mark.parametrize('dtype', (torch.int32, torch.int16, torch.uint8))
def test_any_integer_labels(dtype):
    """Loaders yield labels of many integer types."""
    (Z, W, b), target, weights_RNB, _ = dense_case(seed=21)
    logits_BRC = classify(Z, W, b)
    expected = dense_multimix_loss(logits_BRC, target, weights_RNB)
    torch.testing.assert_close(dense_multimix_loss(logits_BRC, target.to(dtype), weights_RNB), expected, **EXACT)
    torch.testing.assert_close(soft_target(target.to(dtype), 4), soft_target(target, 4))


@pytest.mark.parametrize('scale', (0.5, 2.0, float('nan')))
def test_targets_that_do_not_sum_to_one_are_refused(scale):
    rows_BC = torch.full((4, 7), scale / 7)
    with pytest.raises(ValueError, match='sum to 1'):
        check_values(rows_BC, 7)
    check_values(rows_BC, 7, sum_to_one=False)


@pytest.mark.parametrize('label', (-100, -1, 7, 255))
def test_classes_that_do_not_exist_are_refused(label):
    check_values(torch.tensor([0, 6]), 7)
    with pytest.raises(ValueError, match='classes 0 to 6, got'):
        check_values(torch.tensor([0, label]), 7)
