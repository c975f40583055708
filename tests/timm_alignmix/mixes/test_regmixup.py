"""RegMixup: the sum of two losses by hand, for networks whose examples do not touch each other."""
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy

from timm_alignmix import MixTask, create_mixup
from timm_alignmix.step_random import StepRandom


def tiny():
    torch.manual_seed(0)
    return timm.create_model('test_vit', num_classes=5, img_size=32).double().train()  # no batch norm


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('options', [{}, dict(eta=0.3), dict(per_example=True), dict(eta=0)])
def test_loss_and_gradients_are_those_of_two_losses(options, smoothing):
    images, y = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.arange(6) % 5
    model = tiny()
    task = MixTask(model, 'regmixup', options, criterion_kwargs=dict(smoothing=smoothing), verbose=False)
    draw = task.mix.draw(images, StepRandom(0, 0).at(0, images.device))
    lam, perm = draw['lam'].double(), draw['perm']
    wide = lam.view(-1, 1, 1, 1) if lam.ndim else lam
    clean = F.cross_entropy(model(images), y, label_smoothing=smoothing)
    logits = model(wide * images + (1 - wide) * images[perm])
    ce = [F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction='none') for labels in (y, y[perm])]
    expected = clean + options.get('eta', 1) * (lam * ce[0] + (1 - lam) * ce[1]).mean()
    expected.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    result = task(images, y)
    result['loss'].backward()
    torch.testing.assert_close(result['loss'], expected)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-6, atol=1e-9)
    assert result['output'].shape == (12, 5) and task.mix.num_rows(6, draw) == 12


def test_as_a_mixup_function():
    images, y = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.arange(6) % 5
    model = tiny()
    mixup_fn = create_mixup('regmixup', model, eta=0.5)
    x, target = mixup_fn(images, y)
    assert x.shape == (12, 3, 32, 32) and target.shape == (12, 5) and torch.equal(x[:6], images)
    expected = MixTask(tiny(), 'regmixup', dict(eta=0.5), verbose=False)(images, y)['loss']
    torch.testing.assert_close(SoftTargetCrossEntropy()(model(x), target), expected, rtol=1e-6, atol=1e-6)


def test_lam_is_near_one_half():
    mix, images = MixTask(tiny(), 'regmixup', dict(alpha=20.0), verbose=False).mix, torch.zeros(1, 3, 32, 32)
    lam = torch.stack([mix.draw(images, StepRandom(0).at(step, images.device))['lam'] for step in range(400)])
    assert abs(lam.mean() - 0.5) < 0.02 and abs(lam.std() - (1 / 164) ** 0.5) < 0.01  # of Beta(20, 20)


def test_binary_cross_entropy():
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    rows = torch.eye(5, dtype=torch.float64)[torch.arange(6) % 5]
    model, bce = tiny(), torch.nn.BCEWithLogitsLoss()
    task = MixTask(model, 'regmixup', dict(eta=0.5), criterion=bce, verbose=False)
    draw = task.mix.draw(images, StepRandom(0, 0).at(0, images.device))
    lam, perm = draw['lam'].double(), draw['perm']
    mixed, target = (lam * x + (1 - lam) * x[perm] for x in (images, rows))
    expected = bce(model(images), rows) + 0.5 * bce(model(mixed), target)
    torch.testing.assert_close(task(images, rows)['loss'], expected)
    with pytest.raises(ValueError, match="targets='pairs' is for"):
        MixTask(model, 'regmixup', targets='pairs', verbose=False)
