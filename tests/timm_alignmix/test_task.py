"""MixTask as a timm task: criterion, EMA, compile, optimizer groups, checkpoints, DDP."""
import copy
import io
import os
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from timm.data.mixup import mixup_target
from timm.loss import (
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    PolyCrossEntropy,
    SoftTargetCrossEntropy,
)
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

from timm_alignmix import MixTask, create_mix, create_mixup, dense_model_kwargs, list_mixes

FEATURE = dict(
    manifold=dict(layers=[1]), alignmix=dict(mode_probs=(0, 1, 1)), multimix=dict(prob=1.0, n=8),
    densemultimix=dict(prob=1.0, n=8),
)


CLASS_TOKEN = ('tokenmix', 'transmix')  # methods that need one


def tiny_for(mix):
    return tiny('test_vit' if mix in CLASS_TOKEN else 'test_resnet')


def tiny(name='test_resnet', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs).train()


def batch(B=4, size=64):
    return torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(1)), torch.arange(B) % 5


@pytest.mark.parametrize('criterion,reference', [
    (None, nn.CrossEntropyLoss()),
    (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)),
    (LabelSmoothingCrossEntropy(0.1), LabelSmoothingCrossEntropy(0.1)),
    (BinaryCrossEntropy(smoothing=0.1), BinaryCrossEntropy(smoothing=0.1)),
])
def test_none_is_timms_classification_task(criterion, reference):
    images, y = batch()
    theirs = ClassificationTask(tiny(), criterion=reference, verbose=False)(images, y)
    ours = MixTask(tiny(), 'none', criterion=criterion, verbose=False)(images, y)
    torch.testing.assert_close(ours['loss'], theirs['loss'])
    assert torch.equal(ours['output'], theirs['output']) and ours['mode'] == 'clean'


def test_other_criterion_gets_soft_targets():
    images, y = batch()
    task = MixTask(tiny(), 'mixup', criterion=BinaryCrossEntropy(smoothing=0.0), verbose=False)
    result = task(images, y)
    lam = result['lam']
    perm = task.mix.draw(images, task._random.at(0, images.device))['perm']
    target = lam * F.one_hot(y, 5) + (1 - lam) * F.one_hot(y[perm], 5)
    expected = F.binary_cross_entropy_with_logits(result['output'], target)
    torch.testing.assert_close(result['loss'], expected)
    with pytest.raises(ValueError, match='not both'):
        MixTask(tiny(), 'mixup', criterion=SoftTargetCrossEntropy(), criterion_kwargs=dict(smoothing=0.1))


@pytest.mark.parametrize('smoothing', [0.0, 0.4])
@pytest.mark.parametrize('mix', ['mixup', 'cutmix', 'manifold'])
@pytest.mark.parametrize('criterion', [BinaryCrossEntropy, PolyCrossEntropy])
def test_mixed_classes_are_smoothed_once_as_by_timms_mixup(criterion, mix, smoothing):
    images, y = batch()
    task = MixTask(tiny(), mix, FEATURE.get(mix), criterion=criterion(smoothing=smoothing), verbose=False)
    result = task(images, y)
    perm = task.mix.draw(images, task._random.at(0, images.device))['perm']
    y1, y2 = (mixup_target(labels, 5, smoothing=smoothing) for labels in (y, y[perm]))
    target = result['lam'] * y1 + (1 - result['lam']) * y2
    torch.testing.assert_close(result['loss'], criterion(smoothing=0.0)(result['output'], target))


def test_a_criterion_that_smooths_soft_targets_itself_is_left_to_it():
    images, y = batch()
    weight = torch.arange(1.0, 6.0)
    for criterion in (
            nn.CrossEntropyLoss(weight, label_smoothing=0.4), BinaryCrossEntropy(smoothing=0.4, smooth_dense=True)):
        losses = [
            MixTask(tiny(), 'mixup', criterion=criterion, verbose=False)(images, target)['loss']
            for target in (y, F.one_hot(y, 5).float())
        ]
        torch.testing.assert_close(*losses)


@pytest.mark.parametrize('mix', ['none', 'mixup', 'cutmix', 'manifold', 'alignmix'])
def test_any_rows_train_with_another_criterion(mix):
    images, _ = batch()
    rows = torch.tensor([[0, 1, 1, 0, 1.0]]).repeat(4, 1)  # the same in all rows, so mixed ones too
    result = MixTask(tiny(), mix, criterion=BinaryCrossEntropy(), verbose=False)(images, rows)
    torch.testing.assert_close(result['loss'], F.binary_cross_entropy_with_logits(result['output'], rows))


def test_values_of_targets_are_checked_in_the_first_step_alone():
    """The check waits for the device, so it is the same on all of them and done once."""
    images, y = batch()
    task = MixTask(tiny(), 'mixup', verbose=False)
    for wrong, message in ((torch.ones(4, 5), 'sum to 1'), (y + 4, 'classes 0 to 4, got 4 to 7')):
        with pytest.raises(ValueError, match=message):
            task(images, wrong)
    task(images, y)
    assert task(images, torch.ones(4, 5))['loss'].isfinite()


def test_targets_that_do_not_sum_to_one_are_refused():
    images, _ = batch()
    with pytest.raises(ValueError, match='sum to 1'):
        MixTask(tiny(), 'multimix', FEATURE['multimix'], verbose=False)(images, torch.ones(4, 5))
    with pytest.raises(ValueError, match=r'target must be \(4,\) integers or \(4, 5\)'):
        MixTask(tiny(), 'mixup', verbose=False)(images, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize('mix', list_mixes())
def test_soft_targets_equal_their_hard_form(mix):
    images, y = batch()
    losses = [
        MixTask(tiny_for(mix), mix, FEATURE.get(mix), verbose=False)(images, target)['loss']
        for target in (y, F.one_hot(y, 5).float())
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize('mix', list_mixes())
def test_eval_is_never_mixed(mix):
    images, y = batch()
    model = tiny_for(mix)
    task = MixTask(model, mix, FEATURE.get(mix), verbose=False)
    task.trainable_module.eval()
    result = task(images, y)
    assert torch.equal(result['output'], model(images)) and task.step == 0
    torch.testing.assert_close(result['loss'], F.cross_entropy(model(images), y))
    assert task.get_eval_model() is model


@pytest.mark.parametrize('kind', ['classes', 'soft', 'labels'])
@pytest.mark.parametrize('mix,options', [
    ('none', {}), ('mixup', {}), ('mixup', dict(per_example=True)), ('cutmix', {}), ('manifold', dict(layers=[1])),
    ('manifold', dict(layers=['embedding'])), ('alignmix', dict(mode_probs=(0, 1, 1), per_example=True)),
    ('multimix', dict(prob=0)), ('multimix', dict(prob=1.0, n=8)), ('multimix', dict(prob=1.0, n=7, mix_at=1)),
    ('densemultimix', dict(prob=1.0, n=8)), ('regmixup', {}), ('zeta', {}), ('cutout', {}), ('saliencymix', {}),
    ('alignmix_ae', dict(mode_probs=dict(feat=1), dim=16, width=4)), (dict(mixup=1.0, none=1.0), {}),
])
def test_accuracy_is_the_targets_mass_on_the_predicted_class(mix, options, kind):
    """Against a loop over rows, without label smoothing; steps with a loss in closed form have clean rows."""
    images, y = batch()
    labels = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).float()
    target = dict(classes=y, soft=torch.eye(5)[y] * 0.75 + 0.05, labels=labels)[kind]
    criterion = nn.BCEWithLogitsLoss() if kind == 'labels' else nn.CrossEntropyLoss(label_smoothing=0.1)
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=5)
    model.fc.weight.data *= 100  # the classes differ
    task = MixTask(model.train(), mix, options, criterion, img_size=64, verbose=False)
    draw = task.mix.draw(images, task._random.at(0, images.device))
    result = task(images, target)
    means = []
    for row, logits in enumerate(result['output'].tolist()):
        predicted = logits.index(max(logits))
        mass = [float(t == predicted) if kind == 'classes' else t[predicted] for t in target.tolist()]
        if mix == 'regmixup' and row < 4:
            means.append(mass[row])
        elif 'perm' in draw and mix != 'alignmix_ae':
            lam, partner = draw['lam'].expand(len(y))[row % 4].item(), draw['perm'][row % 4].item()
            means.append(lam * mass[row % 4] + (1 - lam) * mass[partner])
        elif 'weights' in draw and ('mix_at' in options or mix == 'zeta'):
            means.append(sum(w * m for w, m in zip(draw['weights'][row].tolist(), mass, strict=True)))
        else:
            means.append(mass[row])
    assert not result['accuracy'].requires_grad
    assert result['accuracy'].item() == pytest.approx(sum(means) / len(means), abs=1e-6)


def test_accuracy_of_other_targets_is_left_out():
    def criterion(output, target):
        return output.square().mean()

    images, y = batch()
    for target in (y.float(), torch.zeros(4, 3), dict(y=y)):
        assert MixTask(tiny(), 'none', criterion=criterion, verbose=False)(images, target)['accuracy'] is None
    task = MixTask(tiny(), 'mixup', criterion=nn.CrossEntropyLoss(ignore_index=255), targets='pairs', verbose=False)
    assert task(images, torch.full((4,), 255))['accuracy'] == 0  # no class of that number


@pytest.mark.parametrize('mix', ['alignmix', 'densemultimix'])
def test_ema_copies_are_idle_and_checkpoints_plain(mix):
    images, y = batch()
    model = tiny()
    plain = list(model.state_dict())
    task = MixTask(model, mix, FEATURE[mix], verbose=False)
    task.setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    for step in range(3):
        task(images, y)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step + 1)
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    assert list(state['state_dict']) == plain == list(state['state_dict_ema'])
    assert state['task_state'] == dict(step=3, seed=0)
    ema = task.get_eval_model(ema=True)
    assert type(ema) is type(model) and ema is not model
    timm.create_model('test_resnet', num_classes=5).load_state_dict(state['state_dict_ema'], strict=True)
    # The copy mixes nothing, even in train mode and while the original does.
    assert torch.equal(ema.eval()(images), ema.eval()(images))
    clean = tiny()
    clean.load_state_dict(ema.state_dict())
    torch.testing.assert_close(ema.train()(images), clean(images))

    resumed = MixTask(tiny(), mix, FEATURE[mix], verbose=False)
    resumed.load_checkpoint_state(state['state_dict'], task_state=state['task_state'])
    torch.testing.assert_close(resumed(images, y)['loss'], task(images, y)['loss'])


@pytest.mark.parametrize('name,mix', [
    *(('test_resnet', mix) for mix in ('none', *FEATURE)), ('test_vit', 'alignmix'), ('test_vit', 'densemultimix'),
    ('levit_128s', 'densemultimix'), ('test_vit', 'transmix'), ('test_vit', 'tokenmix'), ('test_resnet', 'snapmix'),
])
def test_compiles_without_graph_breaks_to_the_same_loss(mix, name):
    torch._dynamo.reset()
    kwargs = dense_model_kwargs(name) if mix == 'densemultimix' else {}
    model = tiny(name, **kwargs)
    task = MixTask(model, mix, FEATURE.get(mix), verbose=False)
    images, y = batch(size=model.pretrained_cfg['input_size'][-1])
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def three_steps():
        model.load_state_dict(state)
        task.step = 0
        losses = []
        for _ in range(3):
            torch.manual_seed(0)  # drop path
            losses.append(task(images, y)['loss'])
        losses[-1].backward()
        return torch.stack(losses), model.get_parameter(next(iter(state))).grad.clone()

    eager = three_steps()
    model.zero_grad()
    task.compile(backend='aot_eager', fullgraph=True)
    graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
    compiled = three_steps()
    # One graph a mode: nothing is compiled again as lam, the partners or the weights change.
    modes = 2 if mix in ('alignmix', 'transmix', 'tokenmix') else 1  # torch 2.5 has one for each kind of draw
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] - graphs <= modes
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert list(task.get_checkpoint_state()['state_dict']) == list(state)


def test_layer_decay_and_weight_decay_see_the_model_through_the_wrapper():
    def groups(module):
        optimizer = create_optimizer_v2(module, opt='adamw', lr=1e-3, weight_decay=0.1, layer_decay=0.5)
        names = {id(p): name.removeprefix('model.') for name, p in module.named_parameters()}
        return {
            names[id(p)]: (group['weight_decay'], group.get('lr_scale'))
            for group in optimizer.param_groups for p in group['params']}

    model = tiny('test_vit')
    assert groups(MixTask(model, 'alignmix', verbose=False).get_trainable_module()) == groups(model)
    assert 'model.pos_embed' in MixTask(model, 'none', verbose=False).get_trainable_module().no_weight_decay()


@pytest.mark.filterwarnings('ignore:.*torch.jit.script')
def test_removed_hooks_and_by_passed_layers_raise():
    images, y = batch()
    model = tiny()
    task = MixTask(model, 'alignmix', FEATURE['alignmix'], verbose=False)
    task.setup_ema()
    task.remove_hooks()
    assert not any(module._forward_hooks for module in task.modules())
    with pytest.raises(RuntimeError, match='nothing was mixed'):
        task(images, y)
    # What is left is timm's alone.
    assert b'timm_alignmix' not in pickle.dumps(model) + pickle.dumps(copy.deepcopy(model))
    torch.testing.assert_close(torch.jit.script(model.eval())(images), model(images))


def test_early_refusals():
    images, y = batch()
    headless, distilled = timm.create_model('test_resnet', num_classes=0), tiny('levit_128s')
    distilled.set_distilled_training(True)
    wrapper = nn.Module()
    wrapper.timm_model = tiny()
    ignoring, asl = nn.CrossEntropyLoss(ignore_index=255), dict(loss_type='asl')
    for model, mix, options, message in (
            (headless, 'mixup', {}, 'has no classifier'),
            (distilled, 'mixup', {}, r'two outputs in training; call model.set_distilled_training\(False\)'),
            (wrapper, 'alignmix', {}, 'is not a timm model but holds one: pass its .timm_model'),
            (nn.Linear(3, 5), 'mixup', {}, r'is not a timm model .*create_mixup'),
            (nn.DataParallel(tiny()), 'mixup', {}, 'before DDP or torch.compile'),
            (tiny(), 'manifold', dict(mix_kwargs=dict(layers=[])), 'nothing to mix'),
            (tiny(), 'mixup', dict(seed=-1), 'seed must be 0'),
            (tiny(), 'mixup', dict(criterion=ignoring), 'CrossEntropyLoss does not take'),
            (tiny(), 'cutmix', dict(criterion=JsdCrossEntropy()), 'JsdCrossEntropy compares augmented copies'),
            (tiny(), 'cutmix', dict(criterion_kwargs=asl), 'AsymmetricLossSingleLabel does not take'),
    ):
        with pytest.raises(ValueError, match=message):
            MixTask(model, mix, verbose=False, **options)
        assert not any(module._forward_hooks for module in model.modules())
    assert MixTask(tiny(), 'none', criterion=ignoring, verbose=False)(images, y * 0 + 255)['loss'].isnan()

    task = MixTask(tiny('levit_128s'), 'mixup', verbose=False)
    task.trainable_module.model.set_distilled_training(True)
    with pytest.raises(RuntimeError, match='returned a tuple in training'):
        task(*batch(size=224))
    with pytest.raises(ValueError, match='images must be one tensor, got dict'):
        MixTask(tiny(), 'none', verbose=False)(dict(patches=images), y)


@pytest.mark.parametrize('mix', list_mixes())
def test_models_that_cannot_be_mixed_are_refused_in_a_sentence(mix):
    looks_inside = create_mix(mix).binds
    distilled = tiny('deit_tiny_distilled_patch16_224', depth=2)
    distilled.set_distilled_training(True)
    with torch.device('meta'):
        weightless = tiny()
    refused = {
        'has no classifier': timm.create_model('test_resnet', num_classes=0),
        'two outputs in training': distilled,
        'meta device': weightless if looks_inside else None,
        'ResNet is not a timm model': torchvision.models.resnet18(num_classes=5) if looks_inside else None,
    }
    for message, model in refused.items():
        for make in (
                lambda model: MixTask(model, mix, num_classes=5, verbose=False),
                lambda model: create_mixup(mix, model, num_classes=5)):
            if model is not None:
                with pytest.raises(ValueError, match=message):
                    make(model)
                assert not any(module._forward_hooks for module in model.modules())
    if not looks_inside:
        MixTask(weightless, mix, verbose=False)
        images, y = batch()
        task = MixTask(torchvision.models.resnet18(num_classes=5), mix, num_classes=5, verbose=False)
        result = task(images, y)
        result['loss'].backward()
        assert result['loss'].isfinite() and result['output'].shape == (8 if mix == 'regmixup' else 4, 5)


def test_ranks_come_from_torch_distributed(monkeypatch):
    images, y = batch()

    def lam(found, **kwargs):
        task = MixTask(tiny(), 'mixup', verbose=False, **kwargs)
        monkeypatch.setattr(dist, 'is_initialized', lambda: found is not None)
        monkeypatch.setattr(dist, 'get_rank', lambda: found)
        return task(images, y)['lam']

    assert lam(None) == lam(0) == lam(3, rank=0)
    assert lam(0) != lam(1) == lam(0, rank=1)


class Wrapper(nn.Module):
    """A module that holds a task, as a LightningModule does."""

    def __init__(self, seed):
        super().__init__()
        self.task = MixTask(tiny(), 'alignmix', seed=seed, verbose=False)


def test_any_framework_that_saves_modules_resumes_the_draws():
    images, y = batch()
    first = Wrapper(seed=3)
    for _ in range(2):
        first.task(images, y)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = Wrapper(seed=0)
    resumed.load_state_dict(state)
    for _ in range(3):
        a, b = first.task(images, y), resumed.task(images, y)
        assert a['mode'] == b['mode'] and torch.equal(a['loss'], b['loss'])
    # Files from before, without the step, load and begin anew; checkpoints in timm's form have the model's keys.
    assert isinstance(state.pop('task._extra_state'), torch.Tensor)
    old = Wrapper(seed=5)
    old.load_state_dict(state)
    assert (old.task.step, old.task.seed) == (0, 5)
    assert list(old.task.get_checkpoint_state()['state_dict']) == list(tiny().state_dict())


def test_a_mix_object_is_copied_and_options_go_with_names():
    mix = create_mix('alignmix', mode_probs=(0, 1, 0))
    images, y = batch()
    losses = [MixTask(tiny(), mix, verbose=False)(images, y)['loss'] for _ in range(2)]
    assert mix.layers == {} and losses[0] == losses[1]
    with pytest.raises(ValueError, match='has its options'):
        MixTask(tiny(), mix, dict(alpha=1.0), verbose=False)


@pytest.mark.parametrize('mix', list(FEATURE))
def test_bf16_autocast_keeps_the_loss_in_fp32(mix):
    images, y = batch()
    exact = MixTask(tiny(), mix, FEATURE[mix], verbose=False)(images, y)['loss']
    task = MixTask(tiny(), mix, FEATURE[mix], verbose=False)
    with torch.autocast('cpu', torch.bfloat16):
        loss = task(images, y)['loss']
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.02)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def _rank(rank, world, path):
    os.environ['OMP_NUM_THREADS'] = '1'
    dist.init_process_group('gloo', init_method=f'file://{path}/store', rank=rank, world_size=world)
    results = {}
    runs = [(mix, name) for mix in ('alignmix', 'multimix', 'densemultimix') for name in ('test_resnet', 'levit_128s')]
    for mix, name in [*runs, ('alignmix_ae', 'test_resnet')]:
        model = tiny(name)
        size = 64 if name == 'test_resnet' else 224
        options = FEATURE.get(mix, dict(dim=16, width=4))
        task = MixTask(model, mix, options, img_size=size, verbose=False).prepare_distributed()
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(rank))
        modes = []
        for _ in range(3 if mix in FEATURE else 12):  # DDP complains about unused parameters in the second step
            result = task(images, torch.tensor([0, 1]))
            result['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()
            modes.append(result['mode'])
        params = torch.cat([p.detach().flatten() for p in task.get_trainable_module().parameters()])
        results[mix, name] = modes, result['loss'].item(), params
    torch.save(results, f'{path}/rank{rank}.pt')
    dist.destroy_process_group()


def test_two_ranks_share_modes_and_gradients_and_draw_apart(tmp_path):
    mp.spawn(_rank, (2, tmp_path), nprocs=2)
    a, b = (torch.load(tmp_path / f'rank{rank}.pt') for rank in (0, 1))
    for key in a:
        assert a[key][0] == b[key][0], key
        assert a[key][1] != b[key][1], key
        assert torch.equal(a[key][2], b[key][2]), key
    assert set(a['alignmix_ae', 'test_resnet'][0]) == {'clean', 'input', 'feat', 'feat_prime', 'embed'}
