"""--dry-run: what it says against runs, layers and figures that are known otherwise."""
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from alignmix_lab.classification import TrainConfig
from alignmix_lab.classification.build import create_task, model_arguments
from alignmix_lab.classification.dry_run import describe_cost, learning_rates, mode_probabilities, plan_run, step_cost
from alignmix_lab.runs.models import classifier_parameters

SIZES = dict(dataset_size=(1000, 100), num_classes=10, model='test_resnet', img_size=64, device='cpu')


def plan(**options):
    return plan_run(TrainConfig(**{**SIZES, **options}))


def test_methods_know_how_the_run_normalises_its_images():
    run = plan(mix='saliencymix', mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    task = create_task(run.config, model_arguments(run.config), run.data_config, 10, torch.device('cpu'))
    assert [list(values) for values in task.mix.normalization] == [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]


def test_nothing_is_needed_but_sizes(run_training, monkeypatch, tmp_path):
    """Steps of a launch on six processes, with no data, no process group and no folder but the figure's."""
    monkeypatch.setenv('WORLD_SIZE', '6')
    options = dict(SIZES, data_dir=str(tmp_path / 'gone'), output=str(tmp_path / 'out'), experiment='run', dry_run=True)
    run = run_training(TrainConfig(
        **options, mix='alignmix', batch_size=20, grad_accum_steps=3, epochs=7, warmup_epochs=2, model_ema=True))
    lines = '\n'.join(run.log)
    assert 'Global batch: 360 = 20 per process x 3 accumulated x 6 processes' in lines
    assert 'Steps: 7 epochs x 3 updates (8 batches)' in lines
    assert 'Total: 21 updates, 6,720 images' in lines
    assert 'input 0.333, feat 0.333, feat_prime 0.333' in lines
    assert 'optimizer / 6 ' in lines and 'moving average' in lines and 'with --grad-checkpointing ' in lines
    assert yaml.safe_load(run.printed)['lr'] == pytest.approx(0.1 * 360 / 256)
    image = np.asarray(Image.open(tmp_path / 'out' / 'run' / 'learning_rate.png').convert('L'))
    assert image.std() > 5 and [path.name for path in (tmp_path / 'out').rglob('*')] == ['run', 'learning_rate.png']

    monkeypatch.setenv('RANK', '1')
    assert run_training(TrainConfig(**options)).printed == ''


def test_missing_facts_are_asked_for(tmp_path):
    with pytest.raises(ValueError, match='pass its number of classes too: --num-classes'):
        plan(num_classes=None)
    with pytest.raises(ValueError, match='does not exist'):
        plan(dataset_size=None, data_dir=str(tmp_path / 'gone'))
    with pytest.raises(ValueError, match='not enough for one batch'):
        plan(batch_size=1001)
    with pytest.raises(ValueError, match='does not accept images of 48 pixels'):
        plan(model='deit_tiny_patch16_224', img_size=None, min_res=48, max_res=64)


def test_the_data_is_read_where_it_is_there(digits):
    run = plan(data_dir=str(digits), dataset_size=(5, 5), num_classes=None, batch_size=16, num_processes=2)
    assert (run.loaders.num_classes, len(run.loaders.train)) == (10, 84 // 32)


@pytest.mark.parametrize('options, expected', [
    (dict(mix='none'), {'clean': 1}),
    (dict(mix='cutmix'), {'input': 1}),
    (dict(mix='saliencymix', mix_kwargs=dict(prob=0.25)), {'input': 0.25, 'clean': 0.75}),
    (dict(mix='alignmix', mix_kwargs={'mode_probs': (2, 1, 1)}), {'input': 0.5, 'feat': 0.25, 'feat_prime': 0.25}),
    (dict(mix='multimix', mix_kwargs={'prob': 0.7}), {'embedding': 0.7, 'input': 0.3}),
    (dict(mix='manifold', mix_kwargs={'layers': ['input', 'embedding']}), {'input': 0.5, 'embedding': 0.5}),
    (dict(mix={'mixup': 2, 'multimix': 2, 'none': 1}, mix_kwargs={'multimix.prob': 0.75}, mix_prob=0.5),
     {'mixup': 0.2, 'multimix/embedding': 0.15, 'multimix/input': 0.05, 'clean': 0.6}),
])
def test_modes_have_the_probabilities_asked_for(options, expected):
    assert mode_probabilities(plan(**options)) == pytest.approx(expected)


@pytest.mark.parametrize('opt, states', [('momentum', 1), ('adamw', 2), ('lamb', 2)])
def test_memory_is_that_of_a_real_step(opt, states):
    """Counted on real tensors: bytes that autograd holds after the forward pass, and the optimizer after its step."""
    run = plan(opt=opt, batch_size=4, model_ema=True)
    cost = step_cost(run)
    model = timm.create_model('test_resnet', num_classes=10).train()
    values = sum(parameter.numel() for parameter in model.parameters())
    assert cost.parameters == 4 * values
    assert cost.optimizer == pytest.approx(4 * values * states, rel=1e-2)
    assert cost.average == 4 * values + sum(b.numel() * b.element_size() for b in model.buffers())
    held, own = {}, {parameter.data_ptr() for parameter in model.parameters()}

    def hold(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.zeros(4, dtype=torch.long))
    real = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    assert cost.activations == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize('model', ['test_vit', 'resnet18'])
def test_activations_with_checkpointing_are_what_its_graph_holds(model):
    """Counted on real tensors: outside of blocks by hooks, inputs of blocks, and the most that one of them saves."""
    cost = step_cost(plan(model=model, batch_size=4))
    network = timm.create_model(model, num_classes=10, **({'img_size': 64} if model == 'test_vit' else {})).train()
    kind = type(network.blocks[0] if model == 'test_vit' else network.layer1[0])
    own = {parameter.data_ptr() for parameter in network.parameters()}
    held, inputs, within = {}, {}, {}

    def hold(place, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            place[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    def again(block, args, output):
        """The block once more, alone."""
        hold(inputs, args[0])
        within[block] = saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: hold(saved, tensor), lambda tensor: tensor):
            block.forward(args[0])

    for block in network.modules():
        if isinstance(block, kind):
            block.register_forward_hook(again)
    network.set_grad_checkpointing(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: hold(held, tensor), lambda tensor: tensor):
        network(torch.randn(4, 3, 64, 64)).sum()
    size = sum(nbytes for nbytes, _ in {**held, **inputs}.values())
    largest = max(sum(nbytes for nbytes, _ in saved.values()) for saved in within.values())
    assert cost.checkpointed == pytest.approx(size + largest, rel=0.1) and cost.checkpointed < 0.75 * cost.activations


def test_memory_follows_batch_size_and_precision():
    small, large = (step_cost(plan(batch_size=batch)).activations for batch in (4, 8))
    assert large == pytest.approx(2 * small, rel=0.02)
    progressive = plan(min_res=64, max_res=128, end_ramp=3)
    assert step_cost(progressive).activations > 3 * step_cost(plan()).activations
    run = plan(amp=True, opt='adamp', grad_checkpointing=True)  # adamp looks at values
    text = ' '.join(describe_cost(run, step_cost(run)))
    assert 'taken as half' in text and 'the state of adamp is not known' in text and '--grad-checkpointing' in text


def test_compute_is_resnet50s_published_count():
    """4.09 billion multiply-additions for one image, as torchvision documents its ResNet-50."""
    cost = step_cost(plan(model='resnet50', img_size=224, num_classes=1000))
    assert cost.flops / 2 == pytest.approx(4.09e9, rel=1e-3)


def test_the_curve_shows_the_schedule():
    curve = learning_rates(plan(epochs=20, sched='step', decay_epochs=10, decay_rate=0.5, warmup_epochs=0, lr=0.4))
    assert curve.rates[1.0].tolist() == pytest.approx([0.4] * 10 + [0.2] * 10)
    updates = learning_rates(plan(epochs=4, sched='poly', decay_rate=1.0, sched_on_updates=True, warmup_epochs=0, lr=1))
    np.testing.assert_allclose(updates.rates[1.0], 1 - updates.epochs / 4, rtol=1e-9)
    assert len(plan(sched='none', lr=1.0).optimizer.param_groups) == 2
    assert learning_rates(plan(sched='none', lr=1.0, epochs=3)).rates[1.0].tolist() == [1.0] * 3


@pytest.mark.parametrize('model, options', [
    ('test_resnet', {}),
    ('levit_128s', dict(img_size=224)),  # two classifiers
    ('test_vit', dict(img_size=None, layer_decay=0.5)),
    ('test_resnet', dict(weight_decay=0.0)),
])
def test_the_classifier_learns_at_its_own_rate(model, options):
    """Every tensor once, at the rate and weight decay it has without, but for the classifier's ten times the rate."""
    options = dict(dict(model=model, opt='momentum', momentum=0.0, weight_decay=1e-4, sched='constant', warmup_epochs=0,
                        lr=0.1), **options)
    plain, scaled = plan(**options), plan(**options, head_lr_scale=10.0)

    def rates(run):
        network = run.task.get_trainable_module()
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        found = [(names[id(p)], (group['lr'], group['weight_decay']))
                 for group in run.optimizer.param_groups for p in group['params']]
        assert len(found) == len(names) and len(dict(found)) == len(names)
        return dict(found), {names[id(p)] for p in classifier_parameters(network)}

    before, _ = rates(plain)
    after, head = rates(scaled)
    assert head and all(name.startswith(('fc.', 'head')) for name in head)
    for name, (lr, decay) in before.items():
        assert after[name] == pytest.approx((lr * (10 if name in head else 1), decay)), name
