"""Several methods in one run, and steps without mixing."""
import copy
import math
from itertools import count

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.loss import SoftTargetCrossEntropy

from timm_alignmix import MixTask, create_mix, create_mixup
from timm_alignmix.mixes import with_probability
from timm_alignmix.step_random import StepRandom

# One mode each. Of one layer alignmix replaces the output, and densemultimix and snapmix look at it.
OPTIONS = dict(
    none={}, mixup=dict(alpha=0.4), cutmix=dict(per_example=True), manifold=dict(layers=['layer1']),
    alignmix=dict(mode_probs=dict(feat_prime=1), align_at='last'), multimix=dict(prob=1.0, n=8),
    densemultimix=dict(prob=1.0, n=8), comixup=dict(m=3), snapmix={})
SEVERAL = {name: 1 + i % 2 for i, name in enumerate(OPTIONS)}
DOTTED = {f'{name}.{key}': value for name, options in OPTIONS.items() for key, value in options.items()}

pytestmark = pytest.mark.filterwarnings('ignore:.*alignment is .nearly. a no-op')


def tiny(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_resnet', num_classes=5, **kwargs).train()


def batch(B=4, size=64):
    return torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(1)), torch.arange(B) % 5


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_methods_and_modes_are_as_frequent_as_their_weights():
    mix = create_mix(
        {'MixUp': 5, 'multimix': 3.0, 'cut-mix': 0, 'none': 2}, **{'MULTIMIX.n': 2, 'multimix.prob': 0.25})
    expected = {'mixup': 0.5, 'multimix/embedding': 0.075, 'multimix/input': 0.225, 'clean': 0.2}
    assert mix.modes == pytest.approx(expected) and mix.name == 'mixup+multimix+none'
    images, rng, steps = torch.zeros(2, 3, 2, 2), StepRandom(seed=7), 4000
    drawn = [mix.mode_name(mix.draw(images, rng.at(step, images.device))) for step in range(steps)]
    assert set(drawn) == set(expected)
    for mode, p in expected.items():  # five standard deviations of the binomial distribution
        assert abs(drawn.count(mode) - steps * p) < 5 * math.sqrt(steps * p * (1 - p)), mode


def test_the_order_in_which_methods_are_written_does_not_matter():
    """Files sort mappings, and a run that resumes from one must draw the same."""
    images, rng = torch.zeros(2, 3, 2, 2), StepRandom(seed=7)
    first, second = (
        create_mix(weights) for weights in (dict(none=1, mixup=2, cutmix=1), {'cut-mix': 1, 'MixUp': 2, 'none': 1}))
    assert first.name == second.name == 'cutmix+mixup+none'
    for step in range(50):
        a, b = (mix.draw(images, rng.at(step, images.device)) for mix in (first, second))
        assert a['method'] == b['method']


def test_a_step_is_that_of_the_method_alone():
    """Loss, output and gradients, bit by bit, at the first step that draws each of the methods."""
    images, y = batch()
    model, seen = tiny(), set()
    task = MixTask(model, SEVERAL, DOTTED, seed=3, verbose=False)
    for step in count():
        model.zero_grad()
        before = copy.deepcopy(model.state_dict())  # running statistics, which passes over clean images use
        result = task(images, y)
        mode = 'none' if result['mode'] == 'clean' else result['mode'].partition('/')[0]
        if mode not in seen:
            result['loss'].backward()
            other = tiny()
            other.load_state_dict(before)
            alone = MixTask(other, mode, OPTIONS[mode], seed=3, verbose=False)
            alone.step = step
            expected = alone(images, y)
            expected['loss'].backward()
            assert torch.equal(result['loss'], expected['loss']) and torch.equal(result['output'], expected['output'])
            for found, grad in zip(gradients(model), gradients(other), strict=True):
                assert (found is None and grad is None) or torch.equal(found, grad)
            seen.add(mode)
        if seen == set(OPTIONS):
            break


def test_the_function_takes_the_steps_of_the_task():
    images, y = batch()
    task = MixTask(tiny().double(), SEVERAL, DOTTED, seed=3, verbose=False)
    model = tiny().double()
    mixup_fn = create_mixup(SEVERAL, model, seed=3, **DOTTED)
    for _ in range(12):
        result = task(images.double(), y)
        x, target = mixup_fn(images.double(), y)
        torch.testing.assert_close(SoftTargetCrossEntropy()(model(x), target), result['loss'], rtol=1e-6, atol=1e-6)
        assert mixup_fn.mode == result['mode']


def test_one_method_with_a_weight_is_that_method():
    mix = create_mix({'mixup': 0, 'densemultimix': 0.3}, **{'mixup.alpha': 0.1, 'densemultimix.n': 5})
    assert repr(mix) == 'DenseMultiMix(n=5)' and mix.name == 'densemultimix'
    assert mix.signature()['prob'].default == 0.5
    assert create_mix({'mixup': 1, 'multimix': 1}).signature()['multimix.prob'].default == 0.5


@pytest.mark.parametrize('weights, options, said', [
    ({'mixup': 0.5, 'cutmx': 0.5}, {}, "unknown mix 'cutmx'; available: alignmix"),
    ({'mixup': -0.5, 'cutmix': 1}, {}, 'need a weight each, 0 or more.*got mixup=-0.5 cutmix=1'),
    ({'mixup': math.nan, 'cutmix': 1}, {}, 'need a weight each'),
    ({'mixup': math.inf, 'cutmix': 1}, {}, 'need a weight each'),
    ({'mixup': 0, 'cutmix': 0}, {}, 'not all 0'),
    ({'mixup': 1, 'mix-up': 1}, {}, 'no method twice'),
    ({}, {}, 'need a weight each'),
    ({'mixup': 1, 'cutmix': 1}, {'alpha': 1.0}, "option 'alpha' belongs to none of cutmix, mixup: .* cutmix.alpha"),
    ({'mixup': 1, 'cutmix': 1}, {'manifold.alpha': 1.0}, "'manifold.alpha' belongs to none"),
    ({'mixup': 1, 'cutmix': 1}, {'mixup.n': 1}, "mix 'mixup' has no option n; its options: alpha"),
])
def test_refusals(weights, options, said):
    with pytest.raises(ValueError, match=said):
        create_mix(weights, **options)


def test_the_probability_of_mixing_is_a_weight_of_none():
    assert with_probability('mixup', {'alpha': 2.0}, 1.0) == ('mixup', {'alpha': 2.0})
    weights, options = with_probability({'mixup': 3, 'cutmix': 1, 'None': 4}, {'mixup.alpha': 2.0}, 0.5)
    mix = create_mix(weights, **options)
    assert mix.chances == pytest.approx({'mixup': 3 / 16, 'cutmix': 1 / 16, 'none': 12 / 16})
    assert mix.options == {'mixup.alpha': 2.0}
    weights, options = with_probability('mixup', {'alpha': 2.0}, 0.0)
    assert create_mix(weights, **options).name == 'none'
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match='must be from 0 to 1'):
            with_probability('mixup', {}, wrong)


def test_a_loss_in_closed_form_of_one_method_holds_for_all():
    mix = create_mix({'mixup': 1, 'cutmix': 1})
    assert not mix.closed_form and mix.pairs
    mix = create_mix({'mixup': 1, 'alignmix': 1, 'densemultimix': 1})
    assert mix.closed_form and not mix.pairs


def test_methods_that_mix_images_train_any_network():
    images, y = batch()
    model = torchvision.models.resnet18(num_classes=5)
    task = MixTask(model, {'mixup': 1, 'cutmix': 1, 'none': 1}, num_classes=5, verbose=False)
    modes = set()
    for _ in range(8):
        result = task(images, y)
        modes.add(result['mode'])
        assert result['loss'].isfinite()
    assert modes == {'mixup', 'cutmix', 'clean'}
    with pytest.raises(ValueError, match='ResNet is not a timm model'):
        MixTask(model, {'mixup': 1, 'alignmix': 1}, num_classes=5, verbose=False)


@pytest.mark.parametrize('mix, options', [('multimix', dict(prob=1.0, n=8)), (SEVERAL, DOTTED)])
def test_a_step_with_mixing_switched_off_is_clean_and_counts(mix, options):
    images, y = batch()
    always = MixTask(tiny(), mix, options, seed=3, verbose=False)
    task = MixTask(tiny(), mix, options, seed=3, verbose=False)
    plain = tiny()
    for step in range(6):
        task.mix_enabled = step not in (2, 3)
        expected, result = always(images, y), task(images, y)
        if task.mix_enabled:
            assert torch.equal(result['loss'], expected['loss']) and result['mode'] == expected['mode']
        else:
            assert (result['mode'], result['lam']) == ('clean', None)
            torch.testing.assert_close(result['loss'], F.cross_entropy(plain(images), y))
    assert task.step == always.step == 6


@pytest.mark.parametrize('mix', ['alignmix_ae', {'mixup': 0.5, 'alignmix_ae': 0.4, 'none': 0.1}])
def test_layers_of_a_method_get_a_gradient_in_every_step(mix):
    """DistributedDataParallel needs one of each parameter, be it 0."""
    images, y = batch()
    options = dict(dim=8, width=4)
    if isinstance(mix, dict):
        options = {f'alignmix_ae.{key}': value for key, value in options.items()}
    task = MixTask(tiny(), mix, options, img_size=64, verbose=False)
    used = {}
    for step in range(16):
        task.mix_enabled = step % 8 > 0
        task.zero_grad(set_to_none=True)
        result = task(images, y)
        result['loss'].backward()
        own = [p.grad for p in task.trainable_module.extra.parameters()]
        assert all(grad is not None for grad in own + [p.grad for p in task.trainable_module.model.parameters()])
        used[result['mode']] = any(grad.any() for grad in own)
    if isinstance(mix, dict):
        assert {mode.partition('/')[0] for mode in used} == {'mixup', 'alignmix_ae', 'clean'}
        assert used == {mode: mode.startswith('alignmix_ae/') for mode in used}


def test_compiles_to_one_graph_a_mode():
    torch._dynamo.reset()
    images, y = batch()
    model = tiny()
    names = ('none', 'cutmix', 'alignmix', 'densemultimix')
    options = {key: value for key, value in DOTTED.items() if key.partition('.')[0] in names}
    task = MixTask(model, dict.fromkeys(names, 1), options, verbose=False)
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def steps():
        model.load_state_dict(state)
        task.step, results = 0, []
        for step in range(12):
            task.mix_enabled = step < 10
            results.append(task(images, y))
        return [result['mode'] for result in results], torch.stack([result['loss'].detach() for result in results])

    modes, losses = steps()
    assert len(set(modes[:10])) == 4
    task.compile(backend='aot_eager', fullgraph=True)
    graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
    compiled_modes, compiled = steps()
    # The four modes, and the model alone in the steps without mixing.
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] - graphs == 5
    assert compiled_modes == modes
    torch.testing.assert_close(compiled, losses, rtol=1e-4, atol=1e-5)
