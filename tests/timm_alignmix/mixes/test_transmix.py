"""TransMix by hand: attention as the model computes it without a fused kernel, boxes and shares by loops."""
import math

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_alignmix import MixTask, UnsupportedModel, attach, create_mixup
from timm_alignmix.step_random import StepRandom


def tiny(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_vit', num_classes=5, **kwargs).double().train()


def batch(B=3, H=64, W=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, H, W, generator=generator, dtype=torch.float64), torch.arange(B) % 5


def task_of(model=None, prob=1.0, **kwargs):
    return MixTask(model or tiny(), 'transmix', dict(prob=prob), img_size=64, verbose=False, **kwargs)


def attention_of(model, images):
    """Attention of the class token to the patches in the last block, (B, R)."""
    seen, layer = [], model.blocks[-1].attn
    layer.fused_attn = False
    handle = layer.attn_drop.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = model(images)
    handle.remove()
    layer.fused_attn = True
    return seen[0][:, :, 0, 1:].mean(dim=1).detach(), output


@pytest.mark.parametrize('B, H, W', [(3, 64, 64), (1, 64, 96), (5, 96, 32)])
def test_step_by_hand(B, H, W):
    images, y = batch(B, H, W)
    task = task_of()
    draw = task.mix.draw(images, StepRandom(0).at(0, images.device))
    top, left, bottom, right = draw['box'][0].tolist()
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[draw['perm'], :, top:bottom, left:right]
    attention, output = attention_of(tiny(), mixed)
    area = 1 - (bottom - top) * (right - left) / (H * W)
    lam = []
    for row in attention.tolist():
        kept = total = 0.0
        for r, weight in enumerate(row):
            i, j = divmod(r, W // 16)
            pasted = top <= 16 * i < bottom and left <= 16 * j < right  # the first pixel of a patch, as nearest takes
            kept, total = kept + (0 if pasted else weight), total + weight
        lam.append((area + kept / total) / 2)
    lam = torch.tensor(lam, dtype=torch.float64)
    target = lam[:, None] * F.one_hot(y, 5) + (1 - lam[:, None]) * F.one_hot(y[draw['perm']], 5)
    expected = -(target * output.log_softmax(dim=1)).sum(dim=1).mean()
    result = task(images, y)
    torch.testing.assert_close(result['lam'].double(), lam, rtol=0, atol=1e-6)
    torch.testing.assert_close(result['loss'], expected, rtol=1e-6, atol=1e-6)
    assert result['mode'] == 'cutmix' and 0 < area < 1
    hits = target.gather(1, output.argmax(dim=1, keepdim=True))
    torch.testing.assert_close(result['accuracy'].double(), hits.mean(), rtol=0, atol=1e-6)
    result['loss'].backward()  # attention is a number: no gradient flows through lam
    other = tiny()
    (-(target * other(mixed).log_softmax(dim=1)).sum(dim=1).mean()).backward()
    for a, b in zip(task.trainable_module.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def mask_of(top, bottom, left, right):
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    mask[..., top:bottom, left:right] = False
    return mask


def test_identities():
    mix = task_of().mix
    uniform, any_row = torch.full((2, 16), 0.03), torch.rand(2, 16)
    half = dict(mask=mask_of(16, 48, 0, 64), lam=torch.tensor(0.5))
    torch.testing.assert_close(mix.lam(uniform, half), torch.tensor([0.5, 0.5]))  # whole patches: the area
    assert torch.equal(mix.lam(any_row, dict(half, mask=mask_of(0, 64, 0, 64))), torch.zeros(2))
    assert torch.equal(mix.lam(any_row, dict(half, mask=mask_of(0, 0, 0, 0))), torch.ones(2))
    nothing = torch.zeros(2, 16)  # all attention on other tokens
    assert torch.equal(mix.lam(nothing, half), torch.tensor([0.5, 0.5]))
    peak = torch.zeros(2, 16)
    peak[0, 0] = peak[1, 5] = 0.9  # outside of the box, and inside
    torch.testing.assert_close(mix.lam(peak, half), torch.tensor([0.75, 0.25]))
    each = dict(mask=torch.cat([mask_of(0, 64, 0, 64), mask_of(0, 0, 0, 0)]), lam=torch.zeros(2))
    assert torch.equal(mix.lam(any_row, each), torch.tensor([0.0, 1.0]))


def test_other_steps_are_input_mixup():
    images, y = batch()
    task = task_of(prob=0.0)
    draw = task.mix.draw(images, StepRandom(0).at(0, images.device))
    lam, perm = draw['lam'].double(), draw['perm']
    output = tiny()(lam * images + (1 - lam) * images[perm])
    target = lam * F.one_hot(y, 5) + (1 - lam) * F.one_hot(y[perm], 5)
    result = task(images, y)
    torch.testing.assert_close(result['loss'], -(target * output.log_softmax(dim=1)).sum(dim=1).mean())
    assert result['mode'] == 'input' and torch.equal(result['lam'], draw['lam'])
    lams = [task_of(prob=0.0).mix.draw(images, StepRandom(0).at(step, images.device))['lam'] for step in range(3)]
    strong = MixTask(tiny(), 'transmix', dict(prob=0.0, input_alpha=50.0), img_size=64, verbose=False).mix
    near = [strong.draw(images, StepRandom(0).at(step, images.device))['lam'] for step in range(3)]
    assert len(set(lams)) == 3 and all(abs(lam - 0.5) < 0.25 for lam in near)


def test_how_often():
    mix, images = task_of(prob=0.8).mix, batch()[0]
    modes = [mix.mode_name(mix.draw(images, StepRandom(0).at(step, images.device))) for step in range(600)]
    assert set(modes) == {'cutmix', 'input'}
    assert abs(modes.count('cutmix') / 600 - 0.8) < 5 * math.sqrt(0.8 * 0.2 / 600)
    assert mix.modes == {'cutmix': 0.8, 'input': pytest.approx(0.2)}


def test_only_the_first_record_counts_under_checkpointing():
    """The backward pass runs the watched module again, on a model that has changed meanwhile."""
    images, y = batch()
    expected, plain = task_of()(images, y), tiny()
    model = tiny()
    model.set_grad_checkpointing()
    task, calls = task_of(model), []
    model.blocks[-1].attn.qkv.register_forward_hook(lambda *args: calls.append(task.trainable_module.step.output))
    result = task(images, y)
    result['loss'].backward()
    assert len(calls) == 2 and calls[1] is None
    assert torch.equal(result['lam'], expected['lam'])
    assert torch.equal(result['loss'], expected['loss'])
    task_of(plain)(images, y)['loss'].backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    # Attention needs no gradient, so even reentrant checkpointing will do.
    timm.layers.set_reentrant_ckpt(True)
    try:
        assert torch.equal(task_of(model)(images, y)['lam'], expected['lam'])
    finally:
        timm.layers.set_reentrant_ckpt(False)


@pytest.mark.parametrize('targets', ['soft', 'pairs'])
def test_mixup_function_and_attached_form_have_the_tasks_loss(targets):
    images, y = batch()
    criterion = torch.nn.CrossEntropyLoss(reduction='none' if targets == 'pairs' else 'mean')
    expected = task_of(criterion=criterion, targets=targets)(images, y)
    model = tiny()
    mixup_fn = create_mixup('transmix', model, img_size=64, prob=1.0, targets=targets)
    x, target = mixup_fn(images, y)
    if targets == 'pairs':
        y_a, y_b, lam = target
        assert lam.isnan().all()
        output = model(x)
        loss = (lam * criterion(output, y_a) + (1 - lam) * criterion(output, y_b)).mean()
    else:
        assert target.isnan().all()
        loss = criterion(model(x), target)
    torch.testing.assert_close(loss, expected['loss'], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixup_fn.lam, expected['lam'], check_dtype=False)
    attached = attach(other := tiny(), 'transmix', dict(prob=1.0), img_size=64, targets=targets, criterion=criterion)
    assert torch.equal(attached.loss(other(images), y), expected['loss'])
    assert torch.equal(attached.lam, expected['lam']) and attached.mode == 'cutmix'


def test_a_choice_of_methods_watches_in_the_steps_of_its_own():
    images, y = batch()
    options = {'transmix.prob': 1.0, 'densemultimix.n': 4, 'densemultimix.allow_class_token': True}
    task = MixTask(tiny(), dict(transmix=1, densemultimix=1, cutmix=1), options, img_size=64, verbose=False)
    results = [task(images, y) for _ in range(12)]
    modes = [result['mode'] for result in results]
    assert set(modes) == {'transmix', 'densemultimix/dense', 'densemultimix/input', 'cutmix'}
    assert {m: results[modes.index(m)]['lam'].shape for m in ('transmix', 'cutmix')} == {'transmix': (3,), 'cutmix': ()}
    first = modes.index('transmix')
    alone = task_of()
    assert torch.equal([alone(images, y) for _ in range(first + 1)][first]['lam'], results[first]['lam'])


def test_refusals():
    with pytest.raises(UnsupportedModel, match="test_vit does not classify a class token.*or mix cutmix"):
        task_of(tiny(global_pool='avg'))
    images, y = batch()
    with pytest.raises(RuntimeError, match='attends to 8 patches, but images have 4x4.*patch_drop_rate=0'):
        task_of(tiny(patch_drop_rate=0.5))(images, y)
    task = task_of()
    task.remove_hooks()
    with pytest.raises(RuntimeError, match="'blocks.5.attn.qkv' was not called"):
        task(images, y)


def test_bf16_and_compilation():
    images, y = (x.float() if x.is_floating_point() else x for x in batch())
    exact = task_of(tiny().float())(images, y)
    with torch.autocast('cpu', torch.bfloat16):
        rough = task_of(tiny().float())(images, y)
    assert rough['loss'].dtype == rough['lam'].dtype == torch.float32
    torch.testing.assert_close(rough['lam'], exact['lam'], rtol=0, atol=0.01)
    torch.testing.assert_close(rough['loss'], exact['loss'], rtol=0.05, atol=0.02)
    torch._dynamo.reset()
    task = task_of(tiny().float())
    task.compile(backend='aot_eager', fullgraph=True)
    result = task(images, y)
    torch.testing.assert_close(result['lam'], exact['lam'])
    torch.testing.assert_close(result['loss'], exact['loss'])
