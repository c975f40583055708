"""The methods against timm.data.Mixup, against textbook forms written here, and their options and draws."""
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup as TimmMixup
from torch.utils._python_dispatch import TorchDispatchMode

import timm_alignmix
from timm_alignmix import MixTask, create_mix, list_mixes
from timm_alignmix.mixes.base import partners_of
from timm_alignmix.step_random import StepRandom

CLASS_TOKEN = ('tokenmix', 'transmix')  # methods that need one


def tiny(dtype=torch.float64, name='test_resnet', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs).to(dtype).train()


def batch(B=6, size=64, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, size, size, generator=generator, dtype=dtype), torch.arange(B) % 5


def random(seed=0, step=0, rank=0):
    return StepRandom(seed, rank).at(step, torch.device('cpu'))


def drawn(mix, images, rng):
    """A step; methods with a pass over the clean images get a map of the images in place of the gradient."""
    draw = mix.draw(images, rng)
    if 'clean_pass' not in draw:
        return draw
    saliency = images.square().mean(dim=1).sqrt()
    return mix.complete(images, draw, saliency.to(torch.promote_types(images.dtype, torch.float32)), None)


def onehot(y):
    return F.one_hot(y, 5).double()


def soft_ce(logits, target):
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


# Input methods: timm's own arithmetic for the same lam, box and pairing


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('name', ['mixup', 'cutmix'])
def test_input_methods_equal_timm(name, smoothing, monkeypatch):
    images, y = batch(dtype=torch.float32)
    mix = create_mix(name)
    draw = mix.draw(images, random())
    draw['perm'] = torch.arange(6).flip(0)  # timm's pairing
    lam = draw['lam'].item()
    timm_mixup = TimmMixup(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=smoothing, num_classes=5)
    monkeypatch.setattr(timm_mixup, '_params_per_batch', lambda: (lam, name == 'cutmix'))
    if name == 'cutmix':
        top, left, bottom, right = draw['box'][0].tolist()
        monkeypatch.setattr('timm.data.mixup.rand_bbox', lambda *args, **kwargs: (top, bottom, left, right))
    expected_x, expected_target = timm_mixup(images.clone(), y)
    torch.testing.assert_close(mix.images(images, draw), expected_x)
    clean = timm_alignmix.functional.soft_target(y, 5, smoothing)
    torch.testing.assert_close(mix.target(clean, draw), expected_target, rtol=1e-5, atol=1e-6)


def test_cutmix_per_example_pastes_each_box_and_corrects_each_lam():
    images, _ = batch(B=5)
    mix = create_mix('cutmix', per_example=True)
    draw = mix.draw(images, random())
    mixed = mix.images(images, draw)
    assert len(set(draw['lam'].tolist())) > 1
    for i, (top, left, bottom, right) in enumerate(draw['box'].tolist()):
        expected = images[i].clone()
        expected[:, top:bottom, left:right] = images[draw['perm'][i], :, top:bottom, left:right]
        assert torch.equal(mixed[i], expected)
        assert math.isclose(draw['lam'][i].item(), 1 - (bottom - top) * (right - left) / 64 ** 2, rel_tol=1e-6)


# Feature methods: the network run by hand


def run_resnet(model, x, replace=None, at=None):
    x = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    for name in ('layer1', 'layer2', 'layer3', 'layer4'):
        x = model.get_submodule(name)(x)
        if name == at:
            x = replace(x)
    return model.fc(model.global_pool(x))


def draw_of(task, images, step=0):
    return task.mix.draw(images, random(task.seed, step))


@pytest.mark.parametrize('per_example', [False, True])
@pytest.mark.parametrize('at', ['layer1', 'layer3'])
def test_manifold(at, per_example):
    model, (images, y) = tiny(), batch()
    task = MixTask(model, 'manifold', dict(layers=[at], per_example=per_example), verbose=False)
    draw = draw_of(task, images)
    lam, perm = draw['lam'].double(), draw['perm']
    lam_x, lam_y = (lam.view(-1, 1, 1, 1), lam.view(-1, 1)) if per_example else (lam, lam)
    logits = run_resnet(model, images, lambda x: lam_x * x + (1 - lam_x) * x[perm], at)
    expected = soft_ce(logits, lam_y * onehot(y) + (1 - lam_y) * onehot(y)[perm])
    result = task(images, y)
    torch.testing.assert_close(result['loss'], expected)
    assert result['mode'] == at and torch.equal(result['lam'], draw['lam'])


def test_manifold_at_the_embedding_mixes_what_the_classifier_sees():
    model, (images, y) = tiny(), batch()
    task = MixTask(model, 'manifold', dict(layers='embedding'), verbose=False)
    draw = draw_of(task, images)
    lam, perm = draw['lam'].double(), draw['perm']
    z = model.forward_head(model.forward_features(images), pre_logits=True)
    logits = model.fc(lam * z + (1 - lam) * z[perm])
    expected = soft_ce(logits, lam * onehot(y) + (1 - lam) * onehot(y)[perm])
    torch.testing.assert_close(task(images, y)['loss'], expected)


@pytest.mark.parametrize('mode', ['feat', 'feat_prime'])
def test_alignmix_against_a_plain_sinkhorn(mode):
    model, (images, y) = tiny(), batch(B=4)
    task = MixTask(model, 'alignmix', dict(mode_probs={mode: 1}, align_at='layer3'), verbose=False)
    draw = draw_of(task, images)
    lam, perm = draw['lam'].double(), draw['perm']

    def replace(x):
        a = x.flatten(2)
        b = a[perm]
        kept, moved = (a, b) if mode == 'feat' else (b, a)
        with torch.no_grad():
            cost = (kept.unsqueeze(3) - moved.unsqueeze(2)).square().sum(1)
            f = torch.zeros_like(cost[:, :, :1])
            for _ in range(100):  # columns, then rows: the side whose positions are kept is exact
                g = -torch.logsumexp(f - cost / 0.1, dim=1, keepdim=True)
                f = -torch.logsumexp(g - cost / 0.1, dim=2, keepdim=True)
            rows = torch.exp(f + g - cost / 0.1)
        aligned = torch.einsum('bij,bdj->bdi', rows, moved)
        mixed = lam * a + (1 - lam) * aligned if mode == 'feat' else lam * aligned + (1 - lam) * b
        return mixed.view_as(x)

    logits = run_resnet(model, images, replace, 'layer3')
    expected = soft_ce(logits, lam * onehot(y) + (1 - lam) * onehot(y)[perm])
    expected.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    result = task(images, y)
    result['loss'].backward()
    torch.testing.assert_close(result['loss'], expected, rtol=1e-9, atol=1e-9)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-7, atol=1e-9)


def test_alignment_before_gap_and_linear_cancels_and_is_said():
    """With exact columns the aligned mix (11) pools to the unaligned one: the release's layer makes alignment a
    no-op."""
    model, (images, y) = tiny(), batch(B=5, size=96)
    options = dict(mode_probs=(0, 1, 0), align_at='last', final_marginal='columns')
    with pytest.warns(UserWarning, match='no-op'):
        task = MixTask(model, 'alignmix', options, verbose=False)
    draw = draw_of(task, images)
    lam, perm = draw['lam'].double(), draw['perm']
    logits = run_resnet(model, images, lambda x: lam * x + (1 - lam) * x[perm], 'layer4')
    torch.testing.assert_close(task(images, y)['output'], logits, rtol=1e-9, atol=1e-9)
    # One stage earlier it is not a no-op.
    early = MixTask(model, 'alignmix', dict(options, align_at='layer3'), verbose=False)
    unaligned = run_resnet(model, images, lambda x: lam * x + (1 - lam) * x[perm], 'layer3')
    assert not torch.allclose(early(images, y)['output'], unaligned, rtol=1e-3)


def test_class_token_is_mixed_and_not_aligned():
    model = timm.create_model('test_vit', num_classes=5, img_size=64).double().train()
    task = MixTask(model, 'alignmix', dict(mode_probs=(0, 1, 0), align_at=0), img_size=64, verbose=False)
    images, y = batch(B=4)
    draw = draw_of(task, images)
    seen = []
    model.blocks[0].register_forward_hook(lambda m, args, out: seen.append(out))  # runs after the task's
    clean = []
    probe = timm.create_model('test_vit', num_classes=5, img_size=64).double().train()
    probe.load_state_dict(model.state_dict())
    probe.blocks[0].register_forward_hook(lambda m, args, out: clean.append(out))
    probe(images), task(images, y)
    lam, token = draw['lam'].double(), clean[0][:, 0]
    torch.testing.assert_close(seen[0][:, 0], lam * token + (1 - lam) * token[draw['perm']])


def copies_in_a_step(model, images, mode):
    """Copies that PyTorch's operators make of tensors in one step, those inside of operators included."""
    task = MixTask(model, 'alignmix', dict(mode_probs={mode: 1}), img_size=images.shape[-1], verbose=False)
    layer, = task.mix.layers
    strides = []

    def keep(module, args, output):
        strides.append(output.stride())

    before = model.get_submodule(layer).register_forward_hook(keep, prepend=True)
    after = model.get_submodule(layer).register_forward_hook(keep)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        task(images, torch.arange(len(images)) % 5)['loss'].backward()
    before.remove(), after.remove()
    assert strides[0] == strides[1]
    return sum(event.name == 'aten::clone' for event in profile.events())


@pytest.mark.parametrize('name', ['test_vit', 'test_convnext', 'test_resnet'])
def test_alignment_keeps_the_memory_layout_of_the_network(name):
    """Tokens, and maps with channels last: another layout would spread, and later layers copy what they get."""
    options = dict(img_size=64, class_token=False, global_pool='avg') if name == 'test_vit' else {}
    model = timm.create_model(name, num_classes=5, **options).to(memory_format=torch.channels_last)
    images = batch(dtype=torch.float32)[0].to(memory_format=torch.channels_last)
    counts = {mode: copies_in_a_step(model.train(), images, mode) for mode in ('input', 'feat', 'feat_prime')}
    assert counts['feat'] <= counts['input'] and counts['feat_prime'] <= counts['input']


def test_multimix_in_the_textbook_form():
    model, (images, y) = tiny(), batch()
    task = MixTask(model, 'multimix', dict(prob=1.0, n=9), criterion_kwargs=dict(smoothing=0.1), verbose=False)
    weights = draw_of(task, images)['weights'].double()
    weights = weights / weights.sum(dim=1, keepdim=True)
    z = model.forward_head(model.forward_features(images), pre_logits=True)
    target = weights @ (onehot(y) * 0.9 + 0.1 / 5)
    expected = soft_ce(model.fc(weights @ z), target)
    result = task(images, y)
    torch.testing.assert_close(result['loss'], expected, rtol=1e-6, atol=1e-6)
    assert result['mode'] == 'embedding' and result['lam'] is None and result['output'].shape == (6, 5)


@pytest.mark.parametrize('attention,normalize', [('gap', 'relu'), ('cam', 'softmax'), ('none', 'relu')])
def test_densemultimix_in_the_textbook_form(attention, normalize):
    model, (images, y) = tiny(), batch()
    options = dict(prob=1.0, n=9, attention=attention, normalize=normalize)
    task = MixTask(model, 'densemultimix', options, verbose=False)
    weights_RNB = draw_of(task, images)['weights'].double()
    z = model.forward_features(images).flatten(2)  # (B, D, R)
    query = {'gap': z.mean(dim=2), 'cam': model.fc.weight[y], 'none': torch.zeros_like(z[:, :, 0])}[attention]
    a = torch.einsum('bdr,bd->br', z, query)
    a = a.softmax(dim=1) if normalize == 'softmax' else a.relu() / a.relu().sum(dim=1, keepdim=True)
    a = torch.full_like(a, 1 / a.shape[1]) if attention == 'none' else a.detach()
    losses = []
    for r in range(z.shape[2]):
        M = weights_RNB[r] * a[:, r]
        s = M.sum(dim=1)
        M = M / s[:, None]
        ce = -((M @ onehot(y)) * model.fc(M @ z[:, :, r]).log_softmax(dim=1)).sum(dim=1)
        losses.append((s * ce).sum() / s.sum())
    expected = torch.stack(losses).mean()
    expected.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    result = task(images, y)
    result['loss'].backward()
    torch.testing.assert_close(result['loss'], expected, rtol=1e-9, atol=1e-9)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize('name,expected', [('test_resnet', 'relu'), ('test_vit', 'softmax')])
def test_attention_is_normalised_by_the_layout(name, expected):
    options = dict(img_size=64, class_token=False, global_pool='avg', fc_norm=False) if name == 'test_vit' else {}
    torch.manual_seed(0)
    model, (images, y) = timm.create_model(name, num_classes=5, **options).double().eval(), batch()
    losses = {}
    for normalize in (None, 'relu', 'softmax'):
        mix_kwargs = dict(prob=1.0, n=9, normalize=normalize)
        losses[normalize] = MixTask(model, 'densemultimix', mix_kwargs, img_size=64, verbose=False)(images, y)['loss']
    assert losses.pop(None) == losses.pop(expected) != losses.popitem()[1]


def test_multimix_at_an_earlier_layer():
    model, (images, y) = tiny(), batch()
    task = MixTask(model, 'multimix', dict(prob=1.0, n=9, mix_at='layer2'), verbose=False)
    weights = draw_of(task, images)['weights'].double()
    logits = run_resnet(model, images, lambda x: torch.einsum('nb,bchw->nchw', weights, x), 'layer2')
    torch.testing.assert_close(task(images, y)['loss'], soft_ce(logits, weights @ onehot(y)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', ['multimix', 'densemultimix'])
def test_hull_methods_are_input_mixup_otherwise(name):
    model, (images, y) = tiny(), batch()
    task = MixTask(model, name, dict(prob=0.0), verbose=False)
    draw = draw_of(task, images)
    lam, perm = draw['lam'].double(), draw['perm']
    expected = soft_ce(model(lam * images + (1 - lam) * images[perm]), lam * onehot(y) + (1 - lam) * onehot(y)[perm])
    result = task(images, y)
    torch.testing.assert_close(result['loss'], expected)
    assert result['mode'] == 'input'


# Options, names, draws


def test_names_and_options():
    assert list_mixes() == [
        'alignmix', 'alignmix_ae', 'comixup', 'cutmix', 'cutout', 'densemultimix', 'fmix', 'guidedmixup', 'manifold',
        'mixup', 'multimix', 'none', 'puzzlemix', 'regmixup', 'resizemix', 'saliencymix', 'snapmix', 'tokenmix',
        'transmix', 'zeta']
    assert create_mix('AlignMix-AE', dim=16).name == 'alignmix_ae'
    assert create_mix('Dense_Multi-Mix', n=5).name == 'densemultimix'
    with pytest.raises(ValueError, match="unknown mix 'cutmixx'; available: alignmix, alignmix_ae, comixup, cutmix"):
        create_mix('cutmixx')
    with pytest.raises(ValueError, match="'multimix' has no option beta; its options: n=1000, m=None"):
        create_mix('multimix', beta=1)


@pytest.mark.parametrize('name,options,match', [
    ('mixup', dict(alpha=0), 'alpha must be > 0'),
    ('alignmix', dict(eps=0), 'eps must be > 0'),
    ('alignmix', dict(mode_probs=(1, 1)), 'mode_probs.*input, feat, feat_prime'),
    ('alignmix', dict(mode_probs=dict(feature=1)), 'mode_probs'),
    ('alignmix', dict(final_marginal='rows'), "'kept' or 'columns'"),
    ('multimix', dict(n=0), 'n >= 1'),
    ('multimix', dict(alpha=(2, 1)), '0 < low <= high'),
    ('densemultimix', dict(attention='cls'), "attention must be 'gap', 'cam' or 'none'"),
    ('densemultimix', dict(prob=1.5), '0 <= prob <= 1'),
    ('saliencymix', dict(prob=-0.1), 'prob must be 0 to 1'),
    ('saliencymix', dict(box='pair'), "box must be 'example' or 'batch'"),
    ('saliencymix', dict(per_example=True, box='batch'), "needs box='example'"),
    ('guidedmixup', dict(saliency='cam'), "saliency must be 'sr' or 'ap'"),
    ('puzzlemix', dict(gamma=1.1), '0 <= gamma <= 1'),
    ('puzzlemix', dict(n_labels=1), '2 to 9 labels'),
    ('puzzlemix', dict(saliency_mode='test'), "saliency_mode must be 'eval' or 'train'"),
    ('comixup', dict(blocks=7), '2 to 6 blocks per side'),
    ('comixup', dict(m=0), 'm >= 1'),
    ('comixup', dict(omega=1.5), '0 <= omega <= 1'),
    ('comixup', dict(eta=-1), 'eta and tau >= 0'),
    ('comixup', dict(threshold='none'), "threshold must be 'hard' or 'soft'"),
    ('comixup', dict(saliency_mode='test'), "saliency_mode 'eval' or 'train'"),
    ('resizemix', dict(high=1.1), '0 < low <= high <= 1'),
    ('zeta', dict(gamma=0), 'gamma must be > 0'),
    ('cutout', dict(length=0), 'length >= 1'),
    ('regmixup', dict(eta=-1), 'eta must be >= 0'),
    ('fmix', dict(decay=-1), 'decay must be >= 0'),
    ('transmix', dict(prob=1.1), 'prob must be 0 to 1'),
    ('transmix', dict(input_alpha=0), 'input_alpha must be > 0'),
    ('tokenmix', dict(mask='blocks'), "mask 'block' or 'random'"),
    ('snapmix', dict(alpha=0), 'alpha must be > 0'),
])
def test_options_out_of_range(name, options, match):
    with pytest.raises(ValueError, match=match):
        create_mix(name, **options)


@pytest.mark.parametrize('name,options,expected', [
    ('alignmix', {}, dict(input=1 / 3, feat=1 / 3, feat_prime=1 / 3)),
    ('alignmix', dict(mode_probs=(0.5, 0.25, 0.25)), dict(input=0.5, feat=0.25, feat_prime=0.25)),
    ('manifold', {}, dict(input=1 / 3, layer1=1 / 3, layer2=1 / 3)),
    ('multimix', {}, dict(embedding=0.5, input=0.5)),
    ('densemultimix', dict(prob=0.2, n=1), dict(dense=0.2, input=0.8)),
    ('saliencymix', dict(prob=0.3, centre='random'), dict(input=0.3, clean=0.7)),
])
def test_mode_frequencies_and_modes_shared_by_ranks(name, options, expected):
    task = MixTask(tiny(torch.float32), name, options, verbose=False)
    images = batch(B=2, size=64, dtype=torch.float32)[0]
    ranks = [[task.mix.draw(images, random(0, step, rank)) for step in range(600)] for rank in (0, 1)]
    modes = [[draw['mode'] for draw in draws] for draws in ranks]
    assert modes[0] == modes[1]
    for mode, p in expected.items():
        # Five standard deviations of a binomial.
        assert abs(modes[0].count(mode) / 600 - p) < 5 * math.sqrt(p * (1 - p) / 600)
    first = [next(d for d in draws if d['mode'] == 'input') for draws in ranks]
    assert not torch.equal(first[0]['lam'], first[1]['lam'])


@pytest.mark.parametrize('name, options', [
    ('mixup', dict(per_example=True)), ('comixup', {}), ('cutmix', {}), ('cutout', dict(length=20)), ('fmix', {}),
    ('guidedmixup', dict(prob=1, pairing='random')), ('puzzlemix', {}), ('regmixup', {}), ('resizemix', {}),
    ('saliencymix', dict(prob=1)), ('zeta', {}),
])
def test_draws_are_a_function_of_seed_step_and_rank(name, options):
    mix, images = create_mix(name, **options), batch()[0]
    mixed = mix.images(images, drawn(mix, images, random(3, 7, 1)))
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(mix.images(images, drawn(mix, images, random(3, 7, 1))), mixed)
    others = [mix.images(images, drawn(mix, images, random(*key))) for key in ((4, 7, 1), (3, 8, 1), (3, 7, 0))]
    assert not any(torch.equal(other, mixed) for other in others)


INPUT = [
    ('cutmix', dict(per_example=True)), ('cutmix', {}), ('fmix', dict(per_example=True)), ('fmix', {}),
    ('comixup', {}), ('guidedmixup', dict(prob=1)), ('puzzlemix', {}), ('resizemix', {}), ('saliencymix', dict(prob=1)),
    ('saliencymix', dict(prob=1, box='batch', centre='random')), ('saliencymix', dict(prob=1, per_example=True)),
]


@pytest.mark.parametrize('name, options', INPUT)
def test_masks_weigh_pixels_and_targets(name, options):
    """Images that are one number, and the same number as target: the mean of the mixed image is the mixed target."""
    number = torch.tensor([0.0, 1, 2, 3, 5, 8], dtype=torch.float64)
    images = number.view(6, 1, 1, 1).expand(6, 3, 24, 40)
    for step in range(6):
        mix = create_mix(name, **options)
        draw = drawn(mix, batch(size=40)[0][:, :, :24], random(step=step))
        mean = mix.images(images, draw).mean(dim=(1, 2, 3))
        counted = 1 / (24 * 40) if name == 'fmix' else 1e-6  # of fmix lam is what was drawn
        torch.testing.assert_close(mean, mix.target(number[:, None], draw)[:, 0], rtol=0, atol=8 * counted)
        assert mean.min() >= 0 and mean.max() <= 8


@pytest.mark.parametrize('name, options', [
    ('comixup', {}), ('cutmix', {}), ('fmix', {}), ('guidedmixup', dict(prob=1)), ('mixup', {}),
    ('puzzlemix', dict(transport=False)), ('regmixup', {}), ('saliencymix', dict(prob=1)), ('zeta', {}),
])
def test_equal_images_stay_and_so_do_layouts_and_dtypes(name, options):
    one = batch(B=1, dtype=torch.float32)[0].expand(4, 3, 64, 64)
    mix = create_mix(name, **options)
    for images in (one.contiguous(), one.contiguous(memory_format=torch.channels_last), one.bfloat16()):
        mixed = mix.images(images, drawn(mix, images, random()))
        tolerance = 0.02 if images.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(mixed, images.repeat(len(mixed) // 4, 1, 1, 1), rtol=tolerance, atol=tolerance)
        assert mixed.stride()[1:] == images.stride()[1:]


@pytest.mark.parametrize('name', ['comixup', 'saliencymix', 'guidedmixup', 'puzzlemix', 'zeta'])
def test_autocast_does_not_change_what_is_drawn_and_mixed(name):
    images = batch(dtype=torch.float32)[0]
    mix = create_mix(name, **({} if name in ('comixup', 'zeta') else dict(prob=1)))
    target = onehot(torch.arange(6) % 5).float()
    mixed, rows = (f(x, drawn(mix, images, random())) for f, x in ((mix.images, images), (mix.target, target)))
    with torch.autocast('cpu', torch.bfloat16):
        draw = drawn(mix, images, random())
        assert torch.equal(mix.images(images, draw), mixed) and torch.equal(mix.target(target, draw), rows)


@pytest.mark.parametrize('name', ['snapmix', *CLASS_TOKEN])
def test_draws_and_weights_that_the_model_tells_are_a_function_of_seed_step_and_rank(name):
    network = 'test_vit' if name in CLASS_TOKEN else 'test_resnet'
    images, y = batch()

    def step(seed, number, rank):
        torch.manual_seed(number + 99)
        task = MixTask(tiny(name=network), name, dict(prob=1.0), seed=seed, rank=rank, img_size=64, verbose=False)
        task.step = number
        return task(images, y)

    first, again = step(3, 7, 1), step(3, 7, 1)
    assert torch.equal(first['output'], again['output']) and torch.equal(first['lam'], again['lam'])
    for key in ((4, 7, 1), (3, 8, 1), (3, 7, 0)):
        assert not torch.equal(step(*key)['output'], first['output'])


class Recorder(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize('name, options', [
    ('cutout', {}), ('fmix', dict(per_example=True)), ('guidedmixup', dict(prob=1)), ('regmixup', {}),
    ('saliencymix', dict(prob=1)), ('saliencymix', dict(prob=1, box='batch', centre='random')), ('zeta', {}),
])
def test_nothing_waits_for_the_device_or_is_copied_to_it(name, options):
    """On a GPU, reading a number or making a tensor of Python's numbers would; the mode is drawn on the host."""
    images, mix = batch(B=8, size=140, dtype=torch.float32)[0], create_mix(name, **options)
    rng = random()
    with Recorder() as recorder:
        draw = mix.draw(images, rng)
        mix.images(images, draw)
        mix.target(torch.eye(8), draw)
    assert recorder.names.count('_local_scalar_dense') == (name in ('fmix', 'guidedmixup', 'saliencymix'))
    assert len(recorder.names) > 3
    assert not {'lift_fresh', 'nonzero', 'masked_select', 'index', 'index_put_'} & set(recorder.names)


@pytest.mark.parametrize('name', ['snapmix', *CLASS_TOKEN])
def test_what_the_model_tells_does_not_wait_for_the_device(name):
    network = 'test_vit' if name in CLASS_TOKEN else 'test_resnet'
    module = MixTask(tiny(torch.float32, network), name, dict(prob=1.0), img_size=64, verbose=False).trainable_module
    (images, y), rng, mix = batch(dtype=torch.float32), random(), module.mix
    draw, rows = mix.draw(images, rng), onehot(y)
    with Recorder() as recorder:
        draw = module.complete(images, y, draw)
        mix.images(images, draw)
        if name == 'transmix':
            draw = dict(draw, lam=mix.lam(torch.rand(6, 16), draw))
        mix.target(rows, draw)
    assert len(recorder.names) > 3
    assert not {'_local_scalar_dense', 'lift_fresh', 'nonzero', 'masked_select', 'index_put_'} & set(recorder.names)


def test_lam_is_beta_and_partners_a_permutation():
    from scipy import stats

    images = torch.zeros(64, 1, 1, 1)
    draws = [create_mix('mixup', alpha=0.4, per_example=True).draw(images, random(step=s)) for s in range(40)]
    lam = torch.cat([draw['lam'] for draw in draws]).numpy()
    assert stats.kstest(lam, stats.beta(0.4, 0.4).cdf).pvalue > 1e-3
    assert all(torch.equal(draw['perm'].sort().values, torch.arange(64)) for draw in draws)


@pytest.mark.parametrize('name', sorted(set(list_mixes()) - {'alignmix_ae', 'none'}))
@pytest.mark.parametrize('B', [1, 3])
def test_any_batch_size(name, B):
    options = dict(n=4) if 'multi' in name else {}
    network = 'test_vit' if name in CLASS_TOKEN else 'test_resnet'
    task = MixTask(tiny(torch.float32, name=network).eval(), name, options, verbose=False)
    task.trainable_module.train()
    for module in task.trainable_module.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images, y = batch(B=B, dtype=torch.float32)
    for _ in range(4):
        assert task(images, y)['loss'].isfinite()


@pytest.mark.parametrize('layout', ('contiguous', 'channels last', 'flat channels last', 'vectors', 'part of more'))
def test_partners_keep_the_layout_and_have_the_gradient_of_indexing(layout):
    x = torch.randn(5, 3, 4, 2, dtype=torch.float64)
    if 'channels last' in layout:
        x = x.to(memory_format=torch.channels_last)
    x = {'flat channels last': x.flatten(2), 'vectors': x[..., 0, 0], 'part of more': x[:, :2, 1:3]}.get(layout, x)
    x, perm = x.detach().requires_grad_(), torch.tensor([3, 0, 4, 2, 1])
    partners, grad = partners_of(x, perm), torch.randn_like(x)
    assert torch.equal(partners, x[perm])
    if layout not in ('vectors', 'part of more'):
        assert partners.stride() == x.stride()
    assert torch.equal(torch.autograd.grad(partners, x, grad)[0], torch.autograd.grad(x[perm], x, grad)[0])
    assert torch.autograd.gradgradcheck(lambda x: partners_of(x, perm).square(), x)


@pytest.mark.parametrize('name', ['alignmix', 'densemultimix', {'mixup': 0.5, 'manifold': 0.3, 'none': 0.2}])
def test_512_ranks_mix_in_the_same_mode_and_draw_on_their_own(name):
    images, _ = batch(B=4, size=32, dtype=torch.float32)
    task = MixTask(tiny(torch.float32), name, verbose=False)
    modes = set()
    for step in range(8):
        draws = [task.mix.draw(images, random(3, step, rank)) for rank in range(512)]
        (mode,) = {task.mix.mode_name(draw) for draw in draws}  # else processes would wait for each other's gradients
        modes.add(mode)
        for key in ('lam', 'weights'):
            if torch.is_tensor(draws[0].get(key)):
                assert len({draw[key].flatten()[0].item() for draw in draws}) > 500  # float32 may repeat
    assert len(modes) > 1


def test_mixtures_of_more_examples_than_there_are_classes_are_remarked_on():
    for name in ('multimix', 'densemultimix'):
        mix = create_mix(name)
        assert 'mixes 128 examples of 10 classes at a time' in mix.remark(128, 10)
        assert mix.remark(128, 10).startswith(name) and not mix.remark(128, 100) and not mix.remark(8, 10)
        assert not create_mix(name, m=4).remark(128, 10) and create_mix(name, m=16).remark(128, 10)
    several = create_mix({'multimix': 0.5, 'cutmix': 0.5})
    assert several.remark(128, 10) == create_mix('multimix').remark(128, 10) and not create_mix('cutmix').remark(128, 2)
