"""Gradient checkpointing: the backward pass computes mixed layers again, with the draw of their forward."""
import copy
import gc
import pickle
import weakref

import pytest
import timm
import timm.layers
import torch
import torch._dynamo
import torch.nn.functional as F

from timm_alignmix import MixTask, attach, create_mixup

# Methods that replace features or read a layer; three draws of the last are of three methods.
METHODS = {
    'alignmix': dict(mode_probs=(0, 1, 1)),
    'manifold': {},
    'multimix': dict(prob=1.0, n=6, mix_at=1),
    'densemultimix': dict(prob=1.0, n=6, allow_class_token=True),
    'alignmix_ae': dict(plain_weight=0, dim=16, width=4),
}
# Methods that read the class token.
WATCHING = dict(transmix=dict(prob=1.0), tokenmix=dict(prob=1.0))
SEVERAL = {'manifold': 1, 'alignmix': 1, 'densemultimix': 1}, {'densemultimix.allow_class_token': True}
# Blocks are computed again one by one, from the model (the first two) or from its stages.
MODELS = dict(
    test_resnet=dict(size=128),
    test_vit=dict(size=160),
    test_convnext=dict(size=64),
    swin_s3_tiny_224=dict(size=224, embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2)),
)


def build(name='test_resnet', checkpointing=True, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).train()
    model.set_grad_checkpointing(checkpointing)
    return model


def run(name, mix, options, checkpointing, forwards=1, compiled=False):
    """Losses, their gradients in one backward pass, and buffers."""
    arguments = dict(MODELS[name])
    size = arguments.pop('size')
    model = build(name, checkpointing, **arguments).double()
    task = MixTask(model, mix, options, img_size=size, verbose=False)
    named = list(task.trainable_module.named_parameters())
    if compiled:
        task.compile(backend='aot_eager', fullgraph=True)
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    losses = []
    for _ in range(forwards):
        torch.manual_seed(0)  # drop path
        losses.append(task(images, torch.arange(4))['loss'])
    sum(reversed(losses)).backward()
    gradients = {key: p.grad for key, p in named if p.grad is not None}
    return torch.stack(losses).detach(), gradients, dict(model.named_buffers())


def assert_same(actual, expected):
    assert torch.equal(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        torch.testing.assert_close(
            actual[1][key], gradient, rtol=1e-8, atol=1e-10 * float(gradient.abs().max()), msg=lambda m, k=key: k + m)


@pytest.mark.parametrize('name, mix', [
    *(('test_resnet', mix) for mix in METHODS), *(('test_vit', mix) for mix in METHODS if mix != 'alignmix_ae'),
    ('test_convnext', 'alignmix'), ('test_convnext', 'multimix'), ('swin_s3_tiny_224', 'alignmix'),
    *(('test_vit', mix) for mix in WATCHING),
])
def test_losses_and_gradients_are_those_without_checkpointing(name, mix):
    options = {**METHODS, **WATCHING}[mix]
    assert_same(run(name, mix, options, True), run(name, mix, options, False))


@pytest.mark.parametrize('name, mix, options', [
    ('test_resnet', *SEVERAL), ('test_vit', 'alignmix', METHODS['alignmix']),
])
def test_each_of_several_forwards_is_computed_again_with_its_own_draw(name, mix, options):
    assert_same(run(name, mix, options, True, forwards=3), run(name, mix, options, False, forwards=3))


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, 'skip_fwd_side_effects_in_bwd_under_checkpoint'),
    reason='torch refuses to compile taps of checkpointed layers before an option that 2.5 lacks and 2.11 has')
@pytest.mark.parametrize('name, mix, options', [
    ('test_resnet', 'alignmix', dict(mode_probs=(0, 1, 0))), ('test_vit', 'alignmix', dict(mode_probs=(0, 1, 0))),
    ('test_resnet', 'alignmix_ae', dict(METHODS['alignmix_ae'], mode_probs=dict(feat=1))),
    ('test_vit', 'transmix', WATCHING['transmix']),
])
def test_compiled_without_graph_breaks(name, mix, options):
    torch._dynamo.reset()
    actual, expected = run(name, mix, options, True, compiled=True), run(name, mix, options, False)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])


@pytest.mark.parametrize('mix, options, name', [
    ('densemultimix', METHODS['densemultimix'], 'weights'), ('alignmix', dict(mode_probs=(1, 0, 0)), 'perm'),
])
def test_a_draw_that_replaces_no_features_does_not_wait_for_the_backward_pass(mix, options, name):
    model = timm.create_model('test_resnet', num_classes=5).train()
    task = MixTask(model, mix, options, img_size=64, verbose=False)
    draw_step, drawn = task.mix.draw, []

    def draw(images, rng):
        step = draw_step(images, rng)
        drawn.append(weakref.ref(step[name]))
        return step

    task.mix.draw = draw
    loss = task(torch.randn(4, 3, 64, 64), torch.arange(4))['loss']
    gc.collect()
    # Gradients of inputs are not asked for, so nothing of the draw is saved for them either.
    assert drawn[0]() is None and loss.requires_grad


def test_running_statistics_are_those_of_checkpointing_without_mixing():
    """torch's checkpointing updates them again when it computes a layer again, with or without mixing."""
    def updates(mix, options, checkpointing):
        buffers = run('test_resnet', mix, options, checkpointing)[2]
        return {key: int(buffer) for key, buffer in buffers.items() if key.endswith('num_batches_tracked')}

    plain = updates('none', {}, True)
    assert plain != updates('none', {}, False)
    assert updates('alignmix', METHODS['alignmix'], True) == plain


@pytest.mark.parametrize('kind', ['task', 'mixup', 'attach'])
def test_other_forwards_before_the_backward_pass_stay_clean(kind):
    x, y = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.arange(4)

    def gradients(checkpointing):
        model, options = build(checkpointing=checkpointing), METHODS['alignmix']
        clean = copy.deepcopy(model)
        if kind == 'task':
            task = MixTask(model, 'alignmix', options, img_size=64, verbose=False)
            task.setup_ema()
            loss = task(x, y)['loss']
        elif kind == 'mixup':
            mixup_fn = create_mixup('alignmix', model, img_size=64, **options)
            mixed, target = mixup_fn(x, y)
            loss = F.cross_entropy(model(mixed), target)
        else:
            loss = (attached := attach(model, 'alignmix', options, img_size=64)).loss(model(x), y)
        clean.load_state_dict(model.state_dict())
        for other in (model.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other.eval()(x), clean.eval()(x))
        # Trained on beside the mixed forward, without being one.
        features = model.train().forward_features(x).square().mean()
        (loss + features).backward()
        assert torch.equal(model.eval()(x), copy.deepcopy(model)(x))
        if kind == 'attach':
            attached.remove_hooks()
        return [p.grad for p in model.parameters()]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-4, atol=1e-6)


def test_a_graph_that_is_kept_is_computed_again_each_time():
    task = MixTask(build(), 'alignmix', METHODS['alignmix'], img_size=64, verbose=False)
    loss = task(torch.randn(4, 3, 64, 64), torch.arange(4))['loss']
    parameters = list(task.trainable_module.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), first)


def test_feature_maps_are_read_through_checkpointing():
    """Dense methods read the positions of images of a new size in evaluation mode."""
    task = MixTask(build(), 'densemultimix', dict(prob=1.0, n=6), img_size=64, verbose=False)
    assert task.mix.head.positions_at(torch.randn(2, 3, 96, 128)) == 3 * 4


@pytest.mark.parametrize('mix', ['alignmix', 'densemultimix'])
def test_reentrant_checkpointing_is_refused(mix):
    task = MixTask(build(), mix, METHODS[mix], img_size=128, verbose=False)
    timm.layers.set_reentrant_ckpt(True)
    try:
        with pytest.raises(RuntimeError, match='reentrant gradient checkpointing, which cannot be mixed'):
            task(torch.randn(4, 3, 128, 128), torch.arange(4))
    finally:
        timm.layers.set_reentrant_ckpt(False)
