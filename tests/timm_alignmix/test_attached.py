"""The attached form against the task form, alone and inside of wrappers."""
import os
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.loss import BinaryCrossEntropy
from torch import nn

from timm_alignmix import MixTask, attach

CASES = [
    ('none', {}), ('cutmix', dict(per_example=True)), ('manifold', dict(layers=[1])),
    ('alignmix', dict(mode_probs=(1, 0, 0))), ('alignmix', dict(mode_probs=(0, 1, 0))),
    ('multimix', dict(prob=1.0, n=20)), ('multimix', dict(prob=1.0, n=7, mix_at=1)), ('multimix', dict(prob=0.0)),
    ('densemultimix', dict(prob=1.0, n=20)), ('densemultimix', dict(prob=1.0, n=5, attention='cam')), ('transmix', {}),
]
FEATURE = dict(alignmix=dict(mode_probs=(0, 1, 0)), multimix=dict(prob=1.0, n=20), densemultimix=dict(prob=1.0, n=20))


def tiny(name='test_resnet'):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).train()


def unhooked(model):
    other = tiny().train(model.training)
    other.load_state_dict(model.state_dict())
    return other


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 64, 64, generator=generator), torch.randint(5, (4,), generator=generator)


class Wrapper(nn.Module):
    """A model of Hugging Face: an output with logits, autocast around its forward alone."""

    def __init__(self, model, dtype=None):
        super().__init__()
        self.timm_model, self.dtype = model, dtype

    def forward(self, pixel_values):
        with torch.autocast('cpu', self.dtype, enabled=self.dtype is not None):
            logits = self.timm_model(x=pixel_values)
        return type('Output', (), dict(logits=logits.float()))()


@pytest.mark.parametrize('mix,options', CASES)
def test_losses_gradients_and_statistics_are_the_tasks(mix, options):
    model, other = (tiny('test_vit' if mix == 'transmix' else 'test_resnet') for _ in range(2))
    kwargs = dict(criterion_kwargs=dict(smoothing=0.1), seed=3, img_size=64)
    task, attached = MixTask(model, mix, options, **kwargs, verbose=False), attach(other, mix, options, **kwargs)
    for step in range(2):
        images, y = batch(step)
        original, result = images.clone(), task(images, y)
        loss = attached.loss(other(images), y)
        assert torch.equal(loss, result['loss']) and torch.equal(images, original)
        assert attached.mode == result['mode'] and (attached.lam is None) == (result['lam'] is None)
        result['loss'].backward()
        loss.backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('mix', list(FEATURE))
def test_autocast_around_the_models_forward_alone(mix):
    images, y = batch()
    model, other = tiny(), tiny()
    with torch.autocast('cpu', torch.bfloat16):
        expected = MixTask(model, mix, FEATURE[mix], img_size=64, verbose=False)(images, y)['loss']
    expected.backward()
    loss = attach(other, mix, FEATURE[mix], img_size=64).loss(Wrapper(other, torch.bfloat16)(pixel_values=images), y)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_other_criteria():
    images, _ = batch()
    rows = torch.tensor([[1., 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 1]])
    model, other = tiny(), tiny()
    expected = MixTask(model, 'mixup', criterion=BinaryCrossEntropy(), verbose=False)(images, rows)['loss']
    assert torch.equal(attach(other, 'mixup', criterion=BinaryCrossEntropy()).loss(other(images), rows), expected)
    with pytest.raises(ValueError, match='MSELoss'):
        attach(tiny(), 'densemultimix', criterion=nn.MSELoss())
    # Without a mix, targets are whatever the criterion takes.
    model = tiny()
    ignoring = attach(model, 'none', criterion=nn.CrossEntropyLoss(ignore_index=255))
    assert ignoring.loss(model(images), torch.tensor([0, 1, 255, 2])).isfinite()


def test_evaluation_is_clean_and_does_not_use_a_step_up():
    images, y = batch()
    model = tiny()
    attached = attach(model, 'alignmix', FEATURE['alignmix'], img_size=64)
    output = model(images)
    clean = model.eval()(images)
    assert torch.equal(clean, unhooked(model)(images))
    torch.testing.assert_close(attached.loss(clean, y), nn.functional.cross_entropy(clean, y))
    model.train()
    assert attached.loss(output, y).isfinite() and attached.state_dict()['step'] == 1


def test_losses_of_accumulated_batches_add_up_to_the_mean_over_all():
    batches = [batch(seed) for seed in range(3)]
    batches[2] = tuple(part[:2] for part in batches[2])
    model = tiny().eval()  # clean losses have a mean over all to compare with
    attached = attach(model, 'mixup')
    images, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    total = sum(attached.loss(model(x), t, num_items_in_batch=torch.tensor(10)) for x, t in batches)
    torch.testing.assert_close(total, nn.functional.cross_entropy(model(images), y))
    halves = zip(images.split(5), nn.functional.one_hot(y, 5).float().split(5), strict=True)
    total = sum(attached.loss(model(x), rows, num_items_in_batch=50) for x, rows in halves)
    torch.testing.assert_close(total, nn.functional.cross_entropy(model(images), y))


def test_unmatched_calls_raise():
    images, y = batch()
    model = tiny()
    attached = attach(model, 'alignmix', FEATURE['alignmix'], img_size=64)
    with pytest.raises(RuntimeError, match='has not run in train mode since'):
        attached.loss(torch.randn(4, 5), y)
    attached.loss(model(images), y)
    with pytest.raises(RuntimeError, match='has not run in train mode since'):
        attached.loss(torch.randn(4, 5), y)
    output = model(images)
    with pytest.raises(RuntimeError, match='ran in train mode twice'):
        model(images)
    with pytest.raises(ValueError, match=r'target must be \(4,\)'):
        attached.loss(output, y[:2])


def test_mix_enabled_trains_clean_and_counts_the_step():
    images, y = batch()
    model, other = tiny(), tiny()
    attached = attach(other, 'densemultimix', FEATURE['densemultimix'], img_size=64)
    attached.mix_enabled = False
    output = other(images)
    assert torch.equal(output, model(images)) and attached.mode == 'clean' and attached.lam is None
    torch.testing.assert_close(attached.loss(output, y), nn.functional.cross_entropy(output, y))
    failing = other.fc.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        other(images)
    failing.remove()
    attached.mix_enabled = True
    assert attached.mix_enabled and attached.loss(other(images), y).isfinite()
    assert attached.mode == 'dense' and attached.state_dict()['step'] == 3


def test_several_methods():
    images, y = batch()
    attached = attach(model := tiny(), {'mixup': 0.5, 'multimix': 0.5}, {'multimix.n': 8}, img_size=64)
    task = MixTask(tiny(), {'mixup': 0.5, 'multimix': 0.5}, {'multimix.n': 8}, img_size=64, verbose=False)
    modes = set()
    for _ in range(6):
        assert torch.equal(attached.loss(model(images), y), (result := task(images, y))['loss'])
        assert attached.mode == result['mode']
        modes.add(attached.mode)
    assert len(modes) > 1


def test_a_forward_that_fails_leaves_nothing_armed():
    images, y = batch()
    model = tiny()
    attached = attach(model, 'manifold', dict(layers=[1, 2]))
    failing = model.fc.register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(4):  # both layers are drawn
        with pytest.raises(ZeroDivisionError):
            model(images)
    failing.remove()
    assert attached.loss(model(images), y).isfinite() and attached.state_dict()['step'] == 5
    torch.testing.assert_close(model.eval()(images), unhooked(model)(images))


def test_models_are_refused_as_by_the_task_and_hooks_come_off():
    model = tiny()
    for mix, match in (('alignmix_ae', 'layers of its own'), ('nope', 'nope')):
        with pytest.raises(ValueError, match=match):
            attach(model, mix, img_size=64)
    with pytest.raises(ValueError, match='pass its .timm_model'):
        attach(Wrapper(model), 'alignmix')
    attached = attach(model, 'densemultimix', img_size=64)
    attached.remove_hooks()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert b'timm_alignmix' not in pickle.dumps(model)


def test_a_resumed_run_continues_its_draws():
    images, y = batch()
    model = tiny()
    first = attach(model, 'mixup', seed=3)
    first.loss(model(images), y)
    state = first.state_dict()
    expected = first.loss(model(images), y)
    first.remove_hooks()
    resumed = attach(model, 'mixup')
    resumed.load_state_dict(state)
    torch.testing.assert_close(resumed.loss(model(images), y), expected)


def _rank(rank, path):
    os.environ['OMP_NUM_THREADS'] = '1'
    dist.init_process_group('gloo', init_method=f'file://{path}/store', rank=rank, world_size=2)
    images, y = batch(rank)
    results = {}
    for mix, options in FEATURE.items():
        model, other = tiny(), tiny()
        task = MixTask(model, mix, options, img_size=64, verbose=False).prepare_distributed()
        task(images, y)['loss'].backward()
        attached = attach(other, mix, options, img_size=64)
        ddp = nn.parallel.DistributedDataParallel(Wrapper(other))
        attached.loss(ddp(pixel_values=images), y).backward()
        results[mix] = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, other)]
    torch.save(results, f'{path}/rank{rank}.pt')
    dist.destroy_process_group()


def test_under_ddp_gradients_are_those_of_the_task(tmp_path):
    mp.spawn(_rank, (tmp_path,), nprocs=2)
    a, b = (torch.load(tmp_path / f'rank{rank}.pt') for rank in (0, 1))
    for mix, (task, attached) in a.items():
        torch.testing.assert_close(attached, task)
        assert torch.equal(attached, b[mix][1]), mix
