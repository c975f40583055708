"""Closed-form binary cross-entropy against timm's own criterion on textbook rows: value and every gradient."""
import numpy as np
import pytest
import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy as TimmBinaryCrossEntropy

from timm_alignmix.functional import BinaryCrossEntropy, dense_multimix_loss, multimix_loss

from . import textbook
from .memory import largest_allocation
from .test_losses import EXACT, classify, dense_case, dirichlet_rows, zero_column, zero_mixed, zero_position

WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.25], dtype=torch.float64)
POS_WEIGHT = torch.tensor([3.0, 0.25, 1.0, 2.0], dtype=torch.float64)
OPTIONS = {
    'plain': {},
    'sum': dict(sum_classes=True),
    'weight': dict(weight=WEIGHT),
    'threshold': dict(target_threshold=0.2),
    'pos_weight': dict(pos_weight=POS_WEIGHT),
    'one pos_weight': dict(pos_weight=torch.tensor(2.5, dtype=torch.float64)),
    'all': dict(weight=WEIGHT, pos_weight=POS_WEIGHT, target_threshold=0.3, sum_classes=True),
    'all but threshold': dict(weight=WEIGHT, pos_weight=POS_WEIGHT, sum_classes=True),
}
TARGETS = ('hard', 'soft', 'multi-hot')


def timms(options):
    """Loss of one example, by timm's criterion, for the loops of the textbook."""
    criterion = TimmBinaryCrossEntropy(smoothing=0.0, **options)
    return lambda logits_C, target_C: criterion(logits_C.unsqueeze(0), target_C.unsqueeze(0))


def binary_case(kind='multi-hot', seed=0, **sizes):
    parameters, target, weights_RNB, attention_BR = dense_case(
        seed=seed, kind='soft' if kind == 'soft' else 'hard', **sizes)
    if kind == 'multi-hot':  # none, one or several classes
        rng = np.random.default_rng(seed)
        target = torch.from_numpy((rng.uniform(size=(len(target), parameters[1].shape[0])) > 0.5).astype(float))
    return parameters, target, weights_RNB, attention_BR


def assert_matches(parameters, target, weights_RNB, attention_BR, options, smoothing=0.0, chunk_size=None):
    """Value, and gradients with respect to features, classifier, bias and attention."""
    attention_BR = attention_BR.clone().requires_grad_()
    inputs = [*parameters, attention_BR]
    Z, W, b = parameters
    Y = textbook.one_hot_targets(target, W.shape[0], smoothing)
    expected = textbook.dense_multimix_loss(Z, W, b, Y, weights_RNB, attention_BR, timms(options))
    actual = dense_multimix_loss(
        classify(*parameters), target, weights_RNB, attention_BR, smoothing=smoothing, attention_grad=True,
        chunk_size=chunk_size, criterion=BinaryCrossEntropy(**options))
    assert actual.dtype == torch.float64 and actual.shape == ()
    torch.testing.assert_close(actual, expected, **EXACT)
    expected_grads = torch.autograd.grad(expected, inputs)
    for got, want in zip(torch.autograd.grad(actual, inputs), expected_grads, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize('kind', TARGETS)
@pytest.mark.parametrize('smoothing', (0.0, 0.1))
@pytest.mark.parametrize('options', OPTIONS)
def test_dense_value_and_gradients(options, smoothing, kind):
    assert_matches(*binary_case(kind), OPTIONS[options], smoothing)


@pytest.mark.parametrize('chunk_size', (1, 2, 4, 11))
@pytest.mark.parametrize('empty', (None, zero_column, zero_position, zero_mixed))
@pytest.mark.parametrize('options', ('plain', 'all', 'all but threshold'))
def test_chunks_and_places_without_attention_change_nothing(options, empty, chunk_size):
    case = binary_case(seed=9, m=3)
    if empty is not None:
        empty(case[3], case[2])
    assert_matches(*case, OPTIONS[options], smoothing=0.1, chunk_size=chunk_size)


@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('kind', TARGETS)
@pytest.mark.parametrize('B, N, m', ((5, 9, 5), (4, 6, 1), (1, 3, 1)))
def test_multimix_value_and_gradients(B, N, m, kind, options):
    (Z, W, b), target, _, _ = binary_case(kind, seed=B, B=B, R=1)
    weights_NB = dirichlet_rows(np.random.default_rng(N), N, B, m)
    Y = textbook.one_hot_targets(target, 4)
    expected = textbook.multimix_loss(Z[:, :, 0].T, W, b, Y, weights_NB, timms(OPTIONS[options]))
    actual = multimix_loss(
        classify(Z, W, b)[:, 0], target, weights_NB, criterion=BinaryCrossEntropy(**OPTIONS[options]))
    torch.testing.assert_close(actual, expected, **EXACT)
    expected_grads = torch.autograd.grad(expected, (Z, W, b))
    for got, want in zip(torch.autograd.grad(actual, (Z, W, b)), expected_grads, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_one_hot_weights_give_torchs_loss_of_the_clean_batch():
    (Z, W, b), target, _, _ = binary_case(seed=2)
    logits_BC = classify(Z, W, b)[:, 0]
    expected = nn.BCEWithLogitsLoss(WEIGHT, pos_weight=POS_WEIGHT)(logits_BC, target)
    criterion = BinaryCrossEntropy(WEIGHT, POS_WEIGHT)
    eye = torch.eye(len(target), dtype=torch.float64)
    torch.testing.assert_close(multimix_loss(logits_BC, target, eye, criterion=criterion), expected, **EXACT)


def test_dense_without_attention_is_uniform_attention():
    parameters, target, weights_RNB, attention_BR = binary_case(seed=6)
    logits_BRC, criterion = classify(*parameters), BinaryCrossEntropy(WEIGHT)
    torch.testing.assert_close(
        dense_multimix_loss(logits_BRC, target, weights_RNB, criterion=criterion),
        dense_multimix_loss(logits_BRC, target, weights_RNB, torch.ones_like(attention_BR), criterion=criterion),
        **EXACT)


@pytest.mark.parametrize('options', ('weight', 'all', 'all but threshold'))
@pytest.mark.parametrize('kind', TARGETS)
def test_gradcheck(kind, options):
    parameters, target, weights_RNB, attention_BR = binary_case(kind, seed=15, B=3, R=2, N=4)
    logits_BRC = classify(*parameters).detach().requires_grad_()

    def loss(logits_BRC, attention_BR):
        return dense_multimix_loss(
            logits_BRC, target, weights_RNB, attention_BR, smoothing=0.1, attention_grad=True, chunk_size=1,
            criterion=BinaryCrossEntropy(**OPTIONS[options]))

    assert torch.autograd.gradcheck(loss, (logits_BRC, attention_BR.requires_grad_()))


@pytest.mark.parametrize('threshold', (None, 0.2))
def test_chunks_bound_the_memory(threshold):
    """No tensor of R * N * C, forward or backward, when positions are taken one at a time."""
    B, R, N, C = 2, 16, 40, 48
    parameters, target, weights_RNB, attention_BR = binary_case(seed=18, B=B, R=R, N=N, C=C)
    logits_BRC = classify(*parameters).detach().requires_grad_()
    criterion = BinaryCrossEntropy(target_threshold=threshold)
    most = [
        largest_allocation(
            lambda size=size: dense_multimix_loss(
                logits_BRC, target, weights_RNB, attention_BR, chunk_size=size, criterion=criterion).backward(),
            itemsize=8)
        for size in (1, R)
    ]
    assert most[0] <= max(N * C, B * R * C)
    assert most[1] >= R * N * C  # the measurement sees what is inside


@pytest.mark.parametrize('autocast', (False, True))
@pytest.mark.parametrize('options', ('plain', 'weight', 'pos_weight'))
@pytest.mark.parametrize('dtype, grad_tol', ((torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)))
def test_losses_compute_in_float32_at_least(dtype, grad_tol, options, autocast):
    """Low precision logits are exact inputs: the result is that of the same numbers in float64."""
    parameters, target, weights_RNB, attention_BR = binary_case(seed=19, B=9, N=50)
    low = (8 * classify(*parameters)).detach().to(dtype)
    weights_RNB, attention_BR = weights_RNB.float(), attention_BR.to(dtype)
    more = dict(smoothing=0.1, attention_grad=True, criterion=BinaryCrossEntropy(**OPTIONS[options]))
    exact = [low.double().requires_grad_(), attention_BR.double().requires_grad_()]
    expected = dense_multimix_loss(exact[0], target, weights_RNB.double(), exact[1], **more)
    expected.backward()
    inputs = [low.requires_grad_(), attention_BR.requires_grad_()]
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        actual = dense_multimix_loss(inputs[0], target, weights_RNB, inputs[1], **more)
        actual.backward()
    assert actual.dtype == torch.float32 and low.grad.dtype == dtype
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    for x, y in zip(inputs, exact, strict=True):
        assert (x.grad.double() - y.grad).abs().max() <= grad_tol * y.grad.abs().max()


@pytest.mark.parametrize('options', ('plain', 'pos_weight'))
@pytest.mark.parametrize('dtype', (torch.float16, torch.float32))
def test_losses_survive_huge_logits(dtype, options):
    """Both signs; half of the vectors' mass is on an example whose every class is wrong by 60000."""
    logits_BRC = torch.tensor([6e4, -6e4, 6e4, -6e4]).repeat(2, 3, 1).to(dtype).requires_grad_()
    target = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    loss = dense_multimix_loss(
        logits_BRC, target, torch.full((3, 5, 2), 0.5), criterion=BinaryCrossEntropy(**OPTIONS[options]))
    loss.backward()
    expected = nn.BCEWithLogitsLoss(pos_weight=OPTIONS[options].get('pos_weight'))(
        logits_BRC.detach()[0].double(), torch.full((3, 4), 0.5, dtype=torch.float64))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert logits_BRC.grad.isfinite().all()


@pytest.mark.parametrize('options', ('weight', 'all'))
def test_inputs_are_left_alone_and_gradients_scale(options):
    parameters, target, weights_RNB, attention_BR = binary_case(seed=20)
    tensors = [classify(*parameters).detach().requires_grad_(), target, weights_RNB, attention_BR.requires_grad_()]
    before = [t.detach().clone() for t in (*tensors, *OPTIONS[options].values()) if isinstance(t, torch.Tensor)]
    loss = dense_multimix_loss(*tensors, attention_grad=True, criterion=BinaryCrossEntropy(**OPTIONS[options]))
    once = torch.autograd.grad(loss, (tensors[0], tensors[3]), retain_graph=True)
    scaled = torch.autograd.grad(-2.5 * loss, (tensors[0], tensors[3]))
    for x, y in zip(once, scaled, strict=True):
        torch.testing.assert_close(y, -2.5 * x, **EXACT)
    after = [t for t in (*tensors, *OPTIONS[options].values()) if isinstance(t, torch.Tensor)]
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True))


@pytest.mark.parametrize('options', ('plain', 'all'))
def test_compiles_into_one_graph(options):
    parameters, target, weights_RNB, attention_BR = binary_case(seed=21)
    criterion = BinaryCrossEntropy(**OPTIONS[options])

    def loss(logits_BRC):
        return dense_multimix_loss(logits_BRC, target, weights_RNB, attention_BR, criterion=criterion)

    grads = []
    for function in (loss, torch.compile(loss, backend='aot_eager', fullgraph=True)):
        logits_BRC = classify(*parameters).detach().requires_grad_()
        function(logits_BRC).backward()
        grads.append(logits_BRC.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize('name', ('weight', 'pos_weight'))
def test_weights_of_other_classes_are_refused(name):
    (Z, W, b), target, weights_RNB, _ = binary_case()
    with pytest.raises(ValueError, match=rf'{name} must be \(4,\) or one number, got \(5,\)'):
        dense_multimix_loss(
            classify(Z, W, b), target, weights_RNB, criterion=BinaryCrossEntropy(**{name: torch.ones(5)}))
