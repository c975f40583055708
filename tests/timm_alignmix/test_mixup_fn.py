"""The function form against the task form, and its arming."""
import pickle

import pytest
import timm
import torch
import torchvision
from timm.loss import SoftTargetCrossEntropy

from timm_alignmix import MixTask, create_mixup, dense_model_kwargs

CASES = [
    ('none', {}), ('mixup', {}), ('cutmix', dict(per_example=True)),
    ('manifold', dict(layers=[1])), ('manifold', dict(layers='embedding')), ('manifold', dict(layers='input')),
    ('alignmix', dict(mode_probs=(0, 1, 0))), ('alignmix', dict(mode_probs=(0, 0, 1))),
    ('alignmix', dict(mode_probs=(1, 0, 0))),
    ('multimix', dict(prob=1.0, n=20)), ('multimix', dict(prob=0.0)), ('multimix', dict(prob=1.0, n=7, mix_at=1)),
    ('densemultimix', dict(prob=1.0, n=20)),
    ('densemultimix', dict(prob=1.0, n=5, attention='cam', normalize='softmax')),
    ('densemultimix', dict(prob=1.0, n=5, attention='none', m=2)), ('densemultimix', dict(prob=0.0)),
    ('cutout', {}), ('fmix', dict(per_example=True)), ('guidedmixup', dict(prob=1.0)), ('regmixup', dict(eta=0.7)),
    ('guidedmixup', dict(prob=1.0, saliency='ap')), ('puzzlemix', {}), ('puzzlemix', dict(saliency_mode='train')),
    ('resizemix', {}), ('saliencymix', dict(prob=1.0)), ('saliencymix', dict(prob=0.0)), ('zeta', {}), ('snapmix', {}),
    ('comixup', dict(m=3)), ('tokenmix', dict(prob=1.0)), ('tokenmix', dict(prob=0.0)),
    ('transmix', dict(prob=1.0, per_example=True)),
]
CLASS_TOKEN = ('tokenmix', 'transmix')  # methods that need one


def tiny(name='test_resnet', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs).double().train()


def batch(B=4, size=64):
    return torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(1)).double(), torch.arange(B) % 5


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('name,options', CASES)
def test_same_loss_gradients_and_statistics_as_the_task(name, options, smoothing):
    network = 'test_vit' if name in CLASS_TOKEN else 'test_resnet'
    images, y = batch()
    model = tiny(network)
    task = MixTask(model, name, options, criterion_kwargs=dict(smoothing=smoothing), seed=3, verbose=False)
    result = task(images, y)
    result['loss'].backward()
    other = tiny(network)
    mixup_fn = create_mixup(name, other, label_smoothing=smoothing, seed=3, **options)
    original = images.clone()
    x, target = mixup_fn(images, y)
    output = other(x)
    loss = SoftTargetCrossEntropy()(output, target)
    loss.backward()
    assert torch.equal(images, original) and output.shape == target.shape and mixup_fn.mode == result['mode']
    # The function's targets are float32, as timm's.
    torch.testing.assert_close(loss, result['loss'], rtol=1e-6, atol=1e-6)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('name', ['levit_128s', 'test_vit'])
def test_dense_rows_on_other_families(name):
    kwargs = dense_model_kwargs(name)
    model, other = tiny(name, **kwargs), tiny(name, **kwargs)
    images, y = batch(size=model.pretrained_cfg['input_size'][-1])
    options = dict(prob=1.0, n=6)
    expected = MixTask(model, 'densemultimix', options, verbose=False)(images, y)['loss']
    x, target = create_mixup('densemultimix', other, **options)(images, y)
    torch.manual_seed(0)
    torch.testing.assert_close(SoftTargetCrossEntropy()(other(x), target), expected, rtol=1e-5, atol=1e-5)


def test_armed_for_exactly_one_training_forward():
    images, y = batch()
    model = tiny()
    mixup_fn = create_mixup('multimix', model, prob=1.0, n=9)
    clean = model.eval()(images)
    model.train()
    x, _ = mixup_fn(images, y)
    assert torch.equal(model.eval()(x), clean)  # evaluation in between is not mixed and does not use the step up
    assert model.train()(x).shape == (9, 5)
    assert model(x).shape == (4, 5)


def test_unmatched_calls_raise():
    images, y = batch()
    model = tiny()
    mixup_fn = create_mixup('alignmix', model, mode_probs=(0, 1, 0))
    mixup_fn(images, y)
    with pytest.raises(RuntimeError, match='called again before the model ran'):
        mixup_fn(images, y)
    with pytest.raises(RuntimeError, match=r'returned images of shape \(4, 3, 64, 64\).*\(2, 3, 64, 64\)'):
        model(images[:2])
    x, _ = mixup_fn(images, y)
    mixup_fn.disarm()
    assert torch.equal(model.eval()(x), model(x))


def test_a_copy_of_dense_targets_taken_too_early_is_loud():
    images, y = batch()
    model = tiny()
    x, target = create_mixup('densemultimix', model, prob=1.0, n=3)(images, y)
    early = target.clone()
    output = model(x)
    assert SoftTargetCrossEntropy()(output, target).isfinite()
    assert SoftTargetCrossEntropy()(output, early).isnan()


def test_mixup_enabled_is_timms_switch():
    images, y = batch()
    model = tiny()
    mixup_fn = create_mixup('densemultimix', model, prob=1.0, label_smoothing=0.1)
    mixup_fn.mixup_enabled = False
    x, target = mixup_fn(images, y)
    assert x is images and model(x).shape == (4, 5) and mixup_fn.mode == 'clean'
    torch.testing.assert_close(target.sum(dim=1), torch.ones(4))
    assert target.max() == pytest.approx(0.92)


def test_wrapped_models_are_refused_and_hooks_come_off():
    model = tiny()
    with pytest.raises(ValueError, match='before DDP or torch.compile'):
        create_mixup('mixup', torch.nn.DataParallel(model))
    mixup_fn = create_mixup('densemultimix', model)
    mixup_fn.remove_hooks()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert b'timm_alignmix' not in pickle.dumps(model)


def test_the_model_may_be_called_by_keyword():
    images, y = batch()
    model = tiny()
    x, _ = create_mixup('multimix', model, prob=1.0, n=9)(images, y)
    assert model(x=x).shape == (9, 5)


def test_models_that_are_not_timms():
    images, y = batch()
    model = torchvision.models.resnet18(num_classes=5).double()
    for name, options in (('mixup', {}), ('alignmix', {}), ('alignmix', dict(num_classes=5))):
        with pytest.raises(ValueError, match=r"ResNet is not a timm model.*create_mixup\('mixup', model, num_c"):
            create_mixup(name, model, **options)
    x, target = create_mixup('cutmix', model, num_classes=5)(images, y)
    assert SoftTargetCrossEntropy()(model(x), target).isfinite()

    class TimmWrapperForImageClassification(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.timm_model = tiny()

    with pytest.raises(ValueError, match='TimmWrapperForImageClassification .* pass its .timm_model'):
        create_mixup('alignmix', TimmWrapperForImageClassification())


def test_workers_of_a_data_loader_are_refused():
    mixup_fn = create_mixup('mixup', tiny())
    loader = torch.utils.data.DataLoader(
        [(image, label.item()) for image, label in zip(*batch(), strict=True)], batch_size=4, num_workers=1,
        collate_fn=lambda samples: mixup_fn(*torch.utils.data.default_collate(samples)))
    with pytest.raises(RuntimeError, match='call it in the training loop'):
        next(iter(loader))


def test_a_resumed_function_continues_its_draws():
    images, y = batch()
    first, resumed = create_mixup('mixup', tiny(), seed=3), create_mixup('mixup', tiny())
    first(images, y)
    resumed.load_state_dict(first.state_dict())
    for a, b in zip(first(images, y), resumed(images, y), strict=True):
        assert torch.equal(a, b)


def test_rows_must_sum_to_one_where_they_are_weighed():
    images, _ = batch()
    rows = torch.ones(4, 5)
    with pytest.raises(ValueError, match='sum to 1'):
        create_mixup('densemultimix', tiny())(images, rows)
    torch.testing.assert_close(create_mixup('mixup', tiny())(images, rows)[1], rows)


def test_option_errors_come_through():
    with pytest.raises(ValueError, match='has no option layers'):
        create_mixup('alignmix', tiny(), layers=[1])
