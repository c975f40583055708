"""Any criterion under mixing: binary cross-entropy in closed form, others on mixed rows, and targets as pairs."""
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.loss import (
    AsymmetricLossMultiLabel,
    AsymmetricLossSingleLabel,
    BinaryCrossEntropy,
    LabelSmoothingCrossEntropy,
    PolyCrossEntropy,
)

from timm_alignmix import MixTask, create_mixup
from timm_alignmix.mixes.criterion import Criterion

WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 1.5], dtype=torch.float64)
BINARY = [
    BinaryCrossEntropy(smoothing=0.0), BinaryCrossEntropy(smoothing=0.2), BinaryCrossEntropy(sum_classes=True),
    BinaryCrossEntropy(smoothing=0.2, smooth_dense=True), BinaryCrossEntropy(target_threshold=0.3),
    BinaryCrossEntropy(weight=WEIGHT, pos_weight=3.0), nn.BCEWithLogitsLoss(),
    nn.BCEWithLogitsLoss(WEIGHT, pos_weight=WEIGHT + 1),
]
OTHER = [
    PolyCrossEntropy(smoothing=0.2), nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2),
    AsymmetricLossMultiLabel(), nn.BCEWithLogitsLoss(reduction='sum'),
]
PAIRS = [
    ('mixup', {}), ('cutmix', {}), ('manifold', dict(layers=[1])), ('alignmix', dict(mode_probs=(0, 1, 0))),
    ('alignmix', dict(mode_probs=(0, 0, 1))), ('multimix', dict(prob=0.0)),
]


def tiny():
    torch.manual_seed(0)
    return timm.create_model('test_resnet', num_classes=5).double().train()


def batch(B=4, size=32):
    images = torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(1)).double()
    rows = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 1]], dtype=torch.float64)
    return images, torch.arange(B) % 5, rows


def draw_of(task, images):
    return task.mix.draw(images, task._random.at(0, images.device))


def smoothed_rows(target, criterion):
    """Rows that are mixed: timm's smoothing of classes, unless the criterion smooths rows by itself."""
    if target.ndim == 2:
        return target
    smooths = isinstance(criterion, nn.CrossEntropyLoss) or getattr(criterion, 'smooth_dense', False)
    smoothing = 0.0 if smooths else getattr(criterion, 'smoothing', 0.0)
    return F.one_hot(target, 5).double() * (1 - smoothing) + smoothing / 5


def assert_same_gradients(model, other, tolerance=1e-6):  # weights are float32, so their sum is 1 to 1e-7
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max()


@pytest.mark.parametrize('kind', ('classes', 'rows'))
@pytest.mark.parametrize('criterion', BINARY + OTHER)
def test_multimix_is_the_criterion_of_mixed_logits_and_targets(criterion, kind):
    """Value and gradients of the closed form, and of the rows for criteria that have none."""
    images, y, rows = batch()
    target = y if kind == 'classes' else rows
    model, other = tiny(), tiny()
    task = MixTask(model, 'multimix', dict(prob=1.0, n=7), criterion=criterion, verbose=False)
    assert Criterion.of(criterion).closed_form == (criterion in BINARY)
    weights_NB = draw_of(task, images)['weights'].double()
    loss = task(images, target)['loss']
    loss.backward()
    expected = criterion(weights_NB @ other(images), weights_NB @ smoothed_rows(target, criterion))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert_same_gradients(model, other)


@pytest.mark.parametrize('attention_grad, kind', [(False, 'classes'), (True, 'rows')])
@pytest.mark.parametrize('criterion', BINARY)
def test_densemultimix_is_the_weighted_mean_of_the_criterion(criterion, kind, attention_grad):
    """Example by example: mixed logits and targets of each position from the model's own head and feature map."""
    images, y, rows = batch(size=64)
    target = y if kind == 'classes' else rows
    model, other = tiny(), tiny()
    options = dict(prob=1.0, n=6, attention_grad=attention_grad)
    task = MixTask(model, 'densemultimix', options, criterion=criterion, img_size=images.shape[2], verbose=False)
    weights_RNB = draw_of(task, images)['weights'].double()
    loss = task(images, target)['loss']
    loss.backward()

    map_BDR = other.forward_features(images).flatten(2)
    attention_BR = torch.einsum('bdr,bd->br', map_BDR, map_BDR.mean(2)).relu()
    attention_BR = attention_BR / attention_BR.sum(1, keepdim=True)
    if not attention_grad:
        attention_BR = attention_BR.detach()
    Y = smoothed_rows(target, criterion)
    positions = []
    for j, lams in enumerate(weights_RNB):
        mixed = lams * attention_BR[:, j]
        losses = [
            criterion((m / m.sum() @ other.get_classifier()(map_BDR[:, :, j]))[None], (m / m.sum() @ Y)[None])
            for m in mixed]
        positions.append((mixed.sum(1) * torch.stack(losses)).sum() / mixed.sum())
    expected = torch.stack(positions).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    assert_same_gradients(model, other)


@pytest.mark.parametrize('criterion', BINARY[1::4])
@pytest.mark.parametrize('name, options', [
    ('multimix', dict(prob=1.0, n=7)), ('multimix', dict(prob=1.0, n=7, mix_at=1)), ('multimix', dict(prob=0.0)),
    ('densemultimix', dict(prob=1.0, n=5, attention='none')),
])
def test_rows_of_a_mixup_function_give_the_tasks_loss(name, options, criterion):
    """Where examples weigh the same: binary cross-entropy of the rows is that of the closed form."""
    images, y, _ = batch(size=64)
    model, other = tiny(), tiny()
    task = MixTask(model, name, options, criterion=criterion, img_size=images.shape[2], verbose=False)
    loss = task(images, y)['loss']
    loss.backward()
    smoothing = 0.0 if getattr(criterion, 'smooth_dense', False) else getattr(criterion, 'smoothing', 0.0)
    x, target = create_mixup(name, other, label_smoothing=smoothing, img_size=images.shape[2], **options)(images, y)
    output = other(x)
    expected = criterion(output, target.double())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)  # the function's targets are float32
    assert_same_gradients(model, other, 1e-5)


@pytest.mark.parametrize('kind', ('classes', 'rows'))
@pytest.mark.parametrize('criterion', [BINARY[1], OTHER[0]])
def test_alignmix_ae_takes_any_criterion(criterion, kind):
    images, y, rows = batch(size=128)
    target = y if kind == 'classes' else rows
    options = dict(dim=16, width=4, mode_probs=dict(input=1), plain_weight=1.0)
    task = MixTask(tiny(), 'alignmix_ae', options, criterion=criterion, img_size=128, verbose=False)
    draw = draw_of(task, images)
    result = task(images, target)
    Y, lam = smoothed_rows(target, criterion), draw['lam'].double()
    expected = criterion(result['output'], lam * Y + (1 - lam) * Y[draw['perm']])
    torch.testing.assert_close(result['loss'], expected, rtol=1e-9, atol=1e-12)


def test_densemultimix_refuses_what_has_no_closed_form():
    class Focal(nn.BCEWithLogitsLoss):
        def forward(self, input, target):
            return super().forward(input, target) ** 2

    for criterion in (OTHER[0], OTHER[3], Focal()):
        model = tiny()
        with pytest.raises(ValueError, match="weighs examples by attention, so .*multimix and the methods that mix"):
            MixTask(model, 'densemultimix', criterion=criterion, verbose=False)
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize('mix', ('multimix', 'densemultimix'))
@pytest.mark.parametrize('criterion', [BINARY[4], BINARY[5]])
def test_compiles_without_graph_breaks_to_the_same_loss(criterion, mix):
    torch._dynamo.reset()
    images, y, _ = batch()
    task = MixTask(tiny(), mix, dict(prob=1.0, n=6), criterion=criterion, verbose=False)

    def losses():
        task.step = 0
        return torch.stack([task(images, y)['loss'] for _ in range(3)])

    eager = losses()
    task.compile(backend='aot_eager', fullgraph=True)
    graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
    compiled = losses()
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] - graphs <= 1
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-8)


# -------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize('criterion', [nn.CrossEntropyLoss(), LabelSmoothingCrossEntropy(0.2)])
@pytest.mark.parametrize('name, options', PAIRS)
def test_pairs_equal_soft_targets_where_the_loss_is_linear(name, options, criterion):
    images, y, _ = batch()
    models = tiny(), tiny()
    losses = []
    for model, targets in zip(models, ('soft', 'pairs'), strict=True):
        task = MixTask(model, name, options, criterion=criterion, targets=targets, img_size=32, verbose=False)
        losses.append(task(images, y)['loss'])
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-8)
    assert_same_gradients(*models, 1e-5)


@pytest.mark.parametrize('criterion', [
    nn.CrossEntropyLoss(WEIGHT), nn.CrossEntropyLoss(ignore_index=2), AsymmetricLossSingleLabel(),
    lambda logits, y: ((1 - logits.softmax(1).gather(1, y[:, None])) ** 2).mean(),  # focal, in spirit
])
@pytest.mark.parametrize('name, options', PAIRS[::2])
def test_pairs_take_criteria_of_classes(name, options, criterion):
    """By the formula of torchvision's and the papers' code, in the task and with the function."""
    images, y, _ = batch()
    task = MixTask(tiny(), name, options, criterion=criterion, targets='pairs', img_size=images.shape[2], verbose=False)
    result = task(images, y)
    draw = draw_of(task, images)
    lam, output = draw['lam'].double(), result['output']
    expected = lam * criterion(output, y) + (1 - lam) * criterion(output, y[draw['perm']])
    torch.testing.assert_close(result['loss'], expected)
    assert lam > 0

    model = tiny()
    mixup_fn = create_mixup(name, model, targets='pairs', img_size=32, **options)
    x, (y_a, y_b, function_lam) = mixup_fn(images, y)
    output = model(x)
    loss = function_lam * criterion(output, y_a) + (1 - function_lam) * criterion(output, y_b)
    torch.testing.assert_close(loss, expected)


def test_pairs_with_a_lam_for_each_example():
    images, y, _ = batch()
    criterion = nn.CrossEntropyLoss(WEIGHT, reduction='none')
    task = MixTask(tiny(), 'mixup', dict(per_example=True), criterion=criterion, targets='pairs', verbose=False)
    result = task(images, y)
    draw = draw_of(task, images)
    expected = 0
    for logits, a, b, lam in zip(result['output'], y, y[draw['perm']], draw['lam'].double(), strict=True):
        log_probs = logits.log_softmax(0)
        expected -= (lam * WEIGHT[a] * log_probs[a] + (1 - lam) * WEIGHT[b] * log_probs[b]) / len(y)
    torch.testing.assert_close(result['loss'], expected)
    task.trainable_module.eval()
    assert task(images, y)['loss'].shape == ()

    mean = MixTask(
        tiny(), 'mixup', dict(per_example=True), criterion=nn.CrossEntropyLoss(WEIGHT), targets='pairs', verbose=False)
    with pytest.raises(ValueError, match=r"return a loss for each, \(4,\), got \(\); .* reduction='none'"):
        mean(images, y)


def test_pairs_of_clean_examples():
    images, y, _ = batch()
    task = MixTask(tiny(), 'none', criterion=nn.CrossEntropyLoss(WEIGHT), targets='pairs', verbose=False)
    result = task(images, y)
    torch.testing.assert_close(result['loss'], nn.CrossEntropyLoss(WEIGHT)(result['output'], y))
    mixup_fn = create_mixup('mixup', tiny(), targets='pairs')
    mixup_fn.mixup_enabled = False
    x, (y_a, y_b, lam) = mixup_fn(images, y)
    assert x is images and torch.equal(y_a, y) and torch.equal(y_b, y) and lam == 1


@pytest.mark.parametrize('name', ('multimix', 'densemultimix', 'alignmix_ae'))
def test_pairs_are_refused_where_there_are_none(name):
    for create in (lambda m: MixTask(m, name, img_size=128, targets='pairs', verbose=False),
                   lambda m: create_mixup(name, m, img_size=128, targets='pairs')):
        model = tiny()
        with pytest.raises(ValueError, match=f"mix '{name}' (mixes more than two|trains layers)"):
            create(model)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_wrong_targets_are_refused():
    with pytest.raises(ValueError, match="'soft' or 'pairs', got 'hard'"):
        MixTask(tiny(), 'mixup', targets='hard', verbose=False)
    with pytest.raises(ValueError, match="label smoothing is the criterion's"):
        create_mixup('mixup', tiny(), label_smoothing=0.1, targets='pairs')
