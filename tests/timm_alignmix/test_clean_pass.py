"""The pass over clean images: its gradient, and that it leaves no trace."""
import gc
import weakref

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_alignmix import MixTask, attach, create_mixup
from timm_alignmix.clean_pass import gradient_saliency


def tiny(name='test_resnet', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs).double().train()


def batch(B=4, size=32):
    return torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(1)).double(), torch.arange(B) % 5


def soft(y):
    return 0.7 * F.one_hot(y, 5).double() + 0.3 * F.one_hot((y + 1) % 5, 5)


@pytest.mark.parametrize('name, size', [('test_resnet', 32), ('test_vit', 160)])
@pytest.mark.parametrize('mode', ['eval', 'train'])
@pytest.mark.parametrize('target', ['classes', 'soft'])
def test_root_mean_square_of_the_gradient(name, size, mode, target):
    images, y = batch(size=size)
    y = soft(y) if target == 'soft' else y
    found = gradient_saliency(tiny(name), images, y, mode)
    model, leaf = tiny(name).train(mode == 'train'), images.clone().requires_grad_()
    rows = y if target == 'soft' else F.one_hot(y, 5).double()
    (-(rows * model(leaf).log_softmax(dim=1)).sum()).backward()
    r, g, b = leaf.grad.unbind(dim=1)
    torch.testing.assert_close(found, ((r ** 2 + g ** 2 + b ** 2) / 3).sqrt(), rtol=1e-10, atol=1e-12)


class Failing(nn.Module):
    def forward(self, x):
        raise ZeroDivisionError


def test_modes_gradients_and_statistics_are_left_alone():
    images, y = batch()
    model = tiny(drop_rate=0.5)
    model.layer2.eval()  # as frozen layers are
    modes = {name: module.training for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    gradient_saliency(model, images, y)
    assert {name: module.training for name, module in model.named_modules()} == modes and modes['layer1']
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not images.requires_grad and images.grad is None and torch.equal(torch.get_rng_state(), rng)
    model.layer4 = Failing()
    with pytest.raises(ZeroDivisionError):
        gradient_saliency(model, images, y)
    assert model.training and model.layer1.training and not model.layer2.training


def test_training_mode_moves_the_statistics():
    images, y = batch()
    model = tiny()
    before = model.bn1.running_mean.clone()
    gradient_saliency(model, images, y, 'train')
    assert not torch.equal(model.bn1.running_mean, before)


def test_nothing_of_the_pass_is_kept():
    """Memory of the pass is free before the step: nothing that its graph saved is alive."""
    images, y = batch()
    model, saved = tiny(), []

    def pack(x):
        saved.append(weakref.ref(x))
        return x

    gc.disable()  # without the help of the collector
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            saliency = gradient_saliency(model, images, y)
        assert len(saved) > 10 and not saliency.requires_grad
        own = {id(x) for x in (y, *model.parameters(), *model.buffers())}
        assert not [ref for ref in saved if ref() is not None and id(ref()) not in own]
    finally:
        gc.enable()


def test_half_precision_counts_up_to_a_factor():
    images, y = batch()
    model = tiny().float()
    exact = gradient_saliency(model, images.float(), y)
    with torch.autocast('cpu', torch.bfloat16):
        rough = gradient_saliency(model, images.float(), y)
    assert rough.dtype == torch.float32
    correlation = torch.corrcoef(torch.stack([exact.flatten(), rough.flatten()]))[0, 1]
    assert correlation > 0.99
    with torch.no_grad():
        assert torch.equal(gradient_saliency(model, images.float(), y), exact)


@pytest.mark.parametrize('name, options', [
    ('puzzlemix', {}), ('comixup', dict(m=2)), ('guidedmixup', dict(saliency='ap', prob=1.0)),
])
def test_the_task_takes_the_pass_of_clean_images_without_smoothing(name, options, monkeypatch):
    images, y = batch()
    model, seen = tiny(), []
    task = MixTask(model, name, options, criterion_kwargs=dict(smoothing=0.1), verbose=False)
    complete = task.mix.complete
    monkeypatch.setattr(task.mix, 'complete', lambda *args: seen.append(args[2]) or complete(*args))
    result = task(images, y)
    result['loss'].backward()
    assert torch.equal(seen[0], gradient_saliency(tiny(), images, y))
    assert result['lam'] is None if name == 'comixup' else result['lam'].shape == (4,)
    # The gradients are those of the mixed step alone.
    other, draw = tiny(), task.mix.draw(images, task._random.at(0, images.device))
    draw = complete(images, draw, seen[0], y)
    target = task.mix.target(0.9 * F.one_hot(y, 5).double() + 0.02, draw)
    F.cross_entropy(other(task.mix.images(images, draw)), target).backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_choices_and_switches():
    images, y = batch()
    task = MixTask(tiny(), {'puzzlemix': 0.5, 'multimix': 0.5}, {'multimix.n': 4}, verbose=False)
    modes = [task(images, y)['mode'].split('/')[0] for _ in range(8)]
    assert set(modes) == {'puzzlemix', 'multimix'}
    alone = MixTask(tiny(), 'puzzlemix', verbose=False)
    expected = [alone(images, y)['lam'] for _ in range(8)]
    again = MixTask(tiny(), {'puzzlemix': 0.5, 'multimix': 0.5}, {'multimix.n': 4}, verbose=False)
    first = modes.index('puzzlemix')
    assert torch.equal([again(images, y) for _ in range(first + 1)][first]['lam'], expected[first])
    task.mix_enabled = False
    assert task(images, y)['mode'] == 'clean'


def test_refusals():
    images, y = batch()
    with pytest.raises(ValueError, match="'puzzlemix' looks at the clean images.*use timm_alignmix.MixTask"):
        attach(tiny(), 'puzzlemix')
    with pytest.raises(ValueError, match='none\\+puzzlemix'):
        attach(tiny(), create_mixup({'puzzlemix': 0.5, 'none': 0.5}, tiny()).mix)
    mix = MixTask(tiny(), 'puzzlemix', verbose=False)
    with pytest.raises(RuntimeError, match='this draw is from before that'):
        mix.mix.images(images, mix._draw(images))
    with pytest.raises(ValueError, match='even sides, got 31x31'):
        mix(images[:, :, 1:, 1:], y)


def test_under_gradient_checkpointing_and_compilation():
    images, y = batch()
    expected = MixTask(tiny(), 'puzzlemix', verbose=False)(images, y)
    model = tiny()
    model.set_grad_checkpointing()
    assert torch.equal(MixTask(model, 'puzzlemix', verbose=False)(images, y)['lam'], expected['lam'])
    task = MixTask(tiny(), 'puzzlemix', verbose=False)
    task.compile(backend='eager')
    result = task(images, y)
    assert torch.equal(result['lam'], expected['lam'])
    torch.testing.assert_close(result['loss'], expected['loss'])
