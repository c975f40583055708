"""AlignMixup/AE: the cases against the network run by hand, Table 6's layer sets, resume, and what is refused."""
import math

import ot
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from timm_alignmix import MixTask, create_mix, create_mixup
from timm_alignmix.models import PreActResNet
from timm_alignmix.models.decoder import ResidualDecoder
from timm_alignmix.step_random import StepRandom

SMALL = dict(dim=16, width=4)
# The ablation grid of the paper: layers, decoder, variational, resolution.
TABLE6 = [
    *((layers, False, False, None) for layers in ('x,e', 'A', 'e', 'x,A', 'x,A,E')),
    *((layers, True, False, None) for layers in ('x,e', 'A', 'e', 'x,A', 'x,E')),
    *(('x,A,e', True, False, side) for side in (2, 4, 8)),
    *((layers, True, True, None) for layers in ('x,e', 'x,A', 'x,E', 'x,A,e')),
]


def tiny(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_resnet', num_classes=5, **kwargs).to(dtype).train()


def batch(B=4, size=128, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, size, size, generator=generator, dtype=dtype), torch.arange(B) % 5


def ae_task(model=None, size=128, **options):
    return MixTask(
        tiny() if model is None else model, 'alignmix_ae', {**SMALL, **options}, img_size=size, verbose=False)


def draw_of(task, images):
    return task.mix.draw(images, StepRandom(task.seed).at(task.step, images.device))


def soft_ce(logits, target):
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


def transported(kept, moved, eps):
    """Features of `moved` at the positions of `kept`, by POT's Sinkhorn to convergence, example by example."""
    out = []
    for a, b in zip(kept.flatten(2), moved.flatten(2), strict=True):
        R = a.shape[1]
        cost = ((a[:, :, None] - b[:, None, :]) ** 2).sum(0).detach()
        plan = ot.sinkhorn(torch.ones(R).double() / R, torch.ones(R).double() / R, cost, eps, 'sinkhorn_log',
                           numItermax=3000, stopThr=1e-12)
        out.append(R * b @ plan.T)
    return torch.stack(out).view_as(kept)


def encode(layers, A):
    """f by hand: a product with the flattened map, or the 2x2 blocks of it."""
    weight, bias = layers.embed.weight, layers.embed.bias
    if weight.ndim == 2:
        code = A.flatten(1) @ weight.T + bias
    else:
        blocks = A.unfold(2, 2, 2).unfold(3, 2, 2)  # (B, D, h, w, 2, 2)
        code = torch.einsum('bdhwij,kdij->bkhw', blocks, weight) + bias.view(-1, 1, 1)
    if layers.variational:
        mean, log_var = code.chunk(2, dim=1)
        code = torch.cat([mean, log_var.exp().sqrt()], dim=1)
    return code


def expected_loss(model, layers, images, y, draw, eps, plain_weight=0.5, aligned=True):
    mode, kind = draw['mode'], draw['mode'].removesuffix('_prime')
    if mode != 'clean':
        lam, perm = draw['lam'].double(), draw['perm']
        hot = F.one_hot(y, 5).double()
        target = lam * hot + (1 - lam) * hot[perm]
    if mode == 'input':
        images = lam * images + (1 - lam) * images[perm]

    def mixed(t):
        if t.ndim == 2 or not aligned:
            return lam * t + (1 - lam) * t[perm]
        if mode.endswith('prime'):
            return lam * transported(t[perm], t, eps) + (1 - lam) * t[perm]
        return lam * t + (1 - lam) * transported(t, t[perm], eps)

    def sampled(code):
        if layers.variational:
            mean, deviation = code.chunk(2, dim=1)
            return (mean + draw['noise'].double() * deviation).flatten(1)
        return code.flatten(1)

    x = model.maxpool(model.act1(model.bn1(model.conv1(images))))
    x = model.layer4(model.layer3(model.layer2(model.layer1(x))))
    z = x.mean(dim=(2, 3))
    side = x.shape[2] // layers.resolution
    A = x.unfold(2, side, side).unfold(3, side, side).mean(dim=(4, 5))
    if mode == 'clean':
        code = encode(layers, A)
        loss = ((layers.decoder(sampled(code)) - images) ** 2).mean()
        if layers.variational:
            mean, deviation = code.flatten(1).chunk(2, dim=1) if code.ndim == 2 else (
                part.flatten(1) for part in code.chunk(2, dim=1))
            normal = torch.distributions.Normal
            kl = torch.distributions.kl_divergence(normal(mean, deviation), normal(0.0, 1.0))
            loss = loss + kl.sum() / images.numel()
        return loss
    code = encode(layers, mixed(A) if kind == 'feat' else A)
    embedded = layers.classifier(sampled(mixed(code) if kind == 'embed' else code))
    if mode != 'input':
        z = lam * z + (1 - lam) * z[perm]
    return plain_weight * soft_ce(model.fc(z), target) + (1 - plain_weight) * soft_ce(embedded, target)


@pytest.mark.parametrize('mode,options', [
    ('clean', {}), ('input', {}), ('feat', {}), ('feat_prime', {}), ('embed', {}),
    ('feat', dict(resolution=2)), ('feat', dict(aligned=False)), ('feat', dict(decoder=False, plain_weight=0.2)),
    ('embed', dict(layers='x,E')), ('embed_prime', dict(layers='x,E')), ('embed', dict(layers='x,E', aligned=False)),
    ('clean', dict(variational=True)), ('embed', dict(variational=True)),
    ('clean', dict(layers='E', variational=True)), ('embed_prime', dict(layers='E', variational=True)),
])
def test_cases_against_the_network_run_by_hand(mode, options):
    """Losses and all gradients, at an eps at which Sinkhorn converges."""
    model, (images, y) = tiny(), batch()
    eps = 8.0
    task = ae_task(model, mode_probs={mode: 1}, eps=eps, iterations=500, **options)
    draw = draw_of(task, images)
    assert draw['mode'] == mode
    plain_weight, aligned = (options.get(key, value) for key, value in (('plain_weight', 0.5), ('aligned', True)))
    expected = expected_loss(model, task.mix.extra, images, y, draw, eps, plain_weight, aligned)
    parameters = list(task.trainable_module.parameters())
    grads = torch.autograd.grad(expected, parameters, allow_unused=True)
    result = task(images, y)
    result['loss'].backward()
    torch.testing.assert_close(result['loss'], expected, rtol=1e-6, atol=1e-9)
    for p, grad in zip(parameters, grads, strict=True):
        torch.testing.assert_close(p.grad, torch.zeros_like(p) if grad is None else grad, rtol=1e-4, atol=1e-7)


def test_plain_weight_0_trains_the_encoder_by_the_papers_classifier_alone():
    grads = []
    for weight in (0.0, 1e-12):
        model, (images, y) = tiny(), batch()
        task = ae_task(model, mode_probs=dict(input=1), plain_weight=weight)
        task(images, y)['loss'].backward()
        grads.append((model.layer1[0].conv1.weight.grad, model.fc.weight.grad, task.mix.extra.embed.weight.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][2], grads[1][2])
    assert grads[0][1].abs().max() > 1e-3 > grads[1][1].abs().max()


@pytest.mark.parametrize('mode', ['input', 'feat', 'feat_prime', 'embed'])
def test_lam_1_is_the_clean_step(mode, monkeypatch):
    """feat_prime moves the features to the partner's positions: the same pooled vector, another e."""
    model, (images, y) = tiny(), batch()
    task = ae_task(model, mode_probs={mode: 1}, plain_weight=1.0 if mode == 'feat_prime' else 0.5)
    monkeypatch.setattr('timm_alignmix.mixes.base.sample_beta', lambda *args: torch.ones(()))
    loss, z = task(images, y)['loss'], task.mix.extra
    feature_map = model.forward_features(images)
    plain = F.cross_entropy(model.forward_head(feature_map), y)
    embedded = F.cross_entropy(z.classifier(z.encode(z.pool(feature_map))), y)
    torch.testing.assert_close(loss, plain if mode == 'feat_prime' else (plain + embedded) / 2)


@pytest.mark.parametrize('layers,decoder,variational,resolution', TABLE6)
def test_every_row_of_table_6_trains(layers, decoder, variational, resolution):
    model = tiny(torch.float32, output_stride=8 if resolution == 8 else 32)
    images, y = batch(B=2, size=64 if resolution == 8 else 128, dtype=torch.float32)
    task = ae_task(
        model, size=images.shape[-1], layers=layers, decoder=decoder, variational=variational, resolution=resolution)
    extra = task.mix.extra
    assert extra.resolution == (resolution or 4) and (extra.decoder is not None) == decoder
    expected = ['clean'] * decoder + ['input'] * ('x' in layers) + ['feat', 'feat_prime'] * ('A' in layers)
    expected += ['embed'] * ('e' in layers.lower()) + ['embed_prime'] * ('E' in layers)
    assert task.mix.probs == {mode: 1 / len(expected) for mode in expected}
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.01)
    for mode in expected:
        task.mix.probs = {mode: 1.0}
        result = task(images, y)
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        assert result['mode'] == mode and result['loss'].isfinite() and (result['lam'] is None) == (mode == 'clean')
        assert all(p.grad is not None and p.grad.isfinite().all() for p in task.trainable_module.parameters())


def test_8x8_by_stride_1_in_the_last_stage():
    """The paper's row for its own network, in small: three stages at 16 px instead of four at 32."""
    for last_stride, side in ((2, 4), (1, 8)):
        model = PreActResNet((1, 1, 1), (4, 8, 8), 4, last_stride=last_stride, num_classes=5)
        assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
        assert model.feature_info[-1]['reduction'] == 16 // side
        task = MixTask(model, 'alignmix_ae', dict(SMALL, resolution=side), img_size=16, verbose=False)
        assert task.mix.extra.embed.weight.shape == (16, 8 * side ** 2)


@pytest.mark.parametrize('options,expected', [
    ({}, dict(clean=0.2, input=0.2, feat=0.2, feat_prime=0.2, embed=0.2)),
    (dict(layers='x A'), dict(clean=0.25, input=0.25, feat=0.25, feat_prime=0.25)),
    (dict(mode_probs=dict(clean=1, embed=3)), dict(clean=0.25, embed=0.75)),
])
def test_frequencies_of_the_cases(options, expected):
    task = ae_task(tiny(torch.float32), **options)
    images = torch.zeros(2, 3, 8, 8)
    rng = StepRandom(0)
    modes = [task.mix.draw(images, rng.at(step, images.device))['mode'] for step in range(800)]
    assert set(modes) == set(expected)
    for mode, p in expected.items():
        # Five standard deviations of a binomial.
        assert abs(modes.count(mode) / 800 - p) < 5 * math.sqrt(p * (1 - p) / 800)


def run_steps(task, optimizer, start, stop):
    losses = []
    for step in range(start, stop):
        images, y = batch(size=64, dtype=torch.float32)
        result = task(images + step, y)
        result['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step + 1)
        losses.append(result['loss'].item())
    return losses


def test_resume_is_bit_exact_and_the_model_stays_plain(tmp_path):
    def setup(seed):
        torch.manual_seed(seed)
        task = ae_task(timm.create_model('test_resnet', num_classes=5), size=64)
        task.setup_ema(decay=0.5)
        task.trainable_module.train()
        return task, create_optimizer_v2(task.trainable_module, opt='adamw', lr=1e-3)

    task, optimizer = setup(0)
    run_steps(task, optimizer, 0, 4)
    state = dict(optimizer=optimizer.state_dict(), **task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True))
    plain = timm.create_model('test_resnet', num_classes=5)
    assert list(state['state_dict']) == list(state['state_dict_ema']) == list(plain.state_dict())
    torch.save(state, tmp_path / 'last.pth.tar')
    straight = run_steps(task, optimizer, 4, 10)

    state = torch.load(tmp_path / 'last.pth.tar', weights_only=True)
    resumed, optimizer = setup(1)
    resumed.load_checkpoint_state(state['state_dict'], state['task_state'])
    resumed.load_checkpoint_state(state['state_dict_ema'], state['task_state_ema'], ema=True)
    optimizer.load_state_dict(state['optimizer'])
    assert run_steps(resumed, optimizer, 4, 10) == straight
    for ema in (False, True):
        a, b = ({**t.get_checkpoint_state(ema=ema)} for t in (task, resumed))
        key = '_ema' if ema else ''
        for name, value in a[f'task_state{key}']['extra'].items():
            assert torch.equal(value, b[f'task_state{key}']['extra'][name]), name
        assert all(torch.equal(v, b[f'state_dict{key}'][k]) for k, v in a[f'state_dict{key}'].items())
    ema, own = (t.get_task_state(ema=e)['extra']['embed.weight'] for t, e in ((task, True), (task, False)))
    assert not torch.equal(ema, own)
    resumed.load_task_state(None, ema=True)
    ema, own = (resumed.get_task_state(ema=e)['extra'] for e in (True, False))
    assert all(torch.equal(ema[key], own[key]) for key in own)
    with pytest.raises(ValueError, match='no weights for the layers of mix .alignmix_ae.'):
        resumed.load_task_state(dict(step=1, seed=0))


def test_optimizer_groups_and_clipping_know_whose_layers_are_whose():
    model = tiny(torch.float32)
    module = ae_task(model).trainable_module
    plain = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    optimizer = create_optimizer_v2(module, opt='adamw', lr=1e-3, weight_decay=0.1, layer_decay=0.5)

    def scales(groups):
        return {id(p): (group['lr_scale'], group['weight_decay']) for group in groups for p in group['params']}

    wrapped, alone = scales(optimizer.param_groups), scales(plain.param_groups)
    assert {key: wrapped[key] for key in alone} == alone
    assert {wrapped[id(p)] for p in module.extra.parameters()} == {(1.0, 0.1), (1.0, 0.0)}
    assert [name for name, _ in module.named_parameters()][-2:] == ['model.fc.weight', 'model.fc.bias']


def test_predict_is_the_papers_network_and_evaluation_the_plain_one():
    model, (images, y) = tiny(), batch()
    task = ae_task(model)
    task.trainable_module.eval()
    layers, A = task.mix.extra, model.forward_features(images)
    by_hand = encode(layers, A) @ layers.classifier.weight.T + layers.classifier.bias
    torch.testing.assert_close(task.mix.predict(images), by_hand)
    assert torch.equal(task(images, y)['output'], model(images)) and task.get_eval_model() is model


def test_compiles_to_the_same_losses():
    torch._dynamo.reset()
    images, y = batch(size=64, dtype=torch.float32)
    losses = []
    for compiled in (False, True):
        task = ae_task(tiny(torch.float32), size=64)
        if compiled:
            task.compile(backend='aot_eager', fullgraph=True)
        for mode in ('clean', 'feat'):
            task.mix.probs = {mode: 1.0}
            losses.append(task(images, y)['loss'])
            losses[-1].backward()
    torch.testing.assert_close(losses[:2], losses[2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('size', [(32, 32), (64, 96), (28, 28)])
def test_decoder_sizes_and_gradients(size):
    decoder = ResidualDecoder(6, size, out_chans=1, width=2).double()
    x = torch.randn(2, 6, dtype=torch.float64)
    assert decoder(x).shape == (2, 1, *size)
    decoder(x).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in decoder.named_parameters() if 'skip.bias' not in name)


def test_decoder_is_the_generator_of_improved_wgans():
    """At 64 px and width 64: 4x4x512, blocks to 512, 256, 128, 64 channels, each with a 1x1 skip."""
    blocks = sum(9 * a * b + 9 * b * b + a * b for a, b in ((512, 512), (512, 256), (256, 128), (128, 64)))
    weights = 128 * 4 * 4 * 512 + blocks + 9 * 64 * 3
    decoder = ResidualDecoder(128, (64, 64))
    assert sum(p.numel() for p in decoder.parameters() if p.ndim > 1) == weights


@pytest.mark.parametrize('options,match', [
    (dict(layers='x,B'), "layers must be some of x, A, and e or E, such as 'x,A,e', got 'x,B'"),
    (dict(layers=('e', 'E')), 'e or E'),
    (dict(variational=True, decoder=False), 'needs decoder=True'),
    (dict(plain_weight=1.5), 'plain_weight must be from 0 to 1'),
    (dict(mode_probs=dict(embed_prime=1)), 'mode_probs must give a probability to each of clean, input, feat'),
])
def test_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        create_mix('alignmix_ae', **options)


@pytest.mark.parametrize('name,size,options,match', [
    ('test_resnet', 64, dict(resolution=4), r'last map is 2x2 for images of 64x64, resolution=4 must be from 2 on'),
    ('test_resnet', 64, dict(layers='x,E'), "an even one from 4 on for layer 'E'"),
    ('test_vit', 160, {}, 'map of a convolutional network'),
    ('test_resnet', 68, {}, r'cannot reach 68x68'),
])
def test_models_and_sizes_that_do_not_fit(name, size, options, match):
    model = timm.create_model(name, num_classes=5)
    with pytest.raises(ValueError, match=match):
        MixTask(model, 'alignmix_ae', options, img_size=size, verbose=False)


def test_other_sizes_at_a_step_and_mixup_functions():
    task = ae_task(tiny(torch.float32), size=64, mode_probs=dict(clean=1), decode_size=32)
    images, y = batch(size=96, dtype=torch.float32)
    assert task(images, y)['loss'].isfinite() and task.mix.extra.decoder.img_size == (32, 32)
    model = tiny(torch.float32)
    with pytest.raises(ValueError, match='use timm_alignmix.MixTask'):
        create_mixup('alignmix_ae', model)
    assert not any(module._forward_hooks for module in model.modules())
