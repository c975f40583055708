"""Flags, YAML files and the sample's settings: what wins, what is refused, what the learning rate becomes."""
import math
import re

import pytest
import torch
import yaml
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

import timm_alignmix
from alignmix_lab.classification import TrainConfig, resolve_config
from alignmix_lab.runs.optim import scaled_lr


@pytest.fixture
def refusal(script, capsys):
    """Callable: the message with which the command line refuses some words."""
    def refuse(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            script.parse_config(list(words))
        assert ended.value.code == 2
        return capsys.readouterr().err
    return refuse


def write_yaml(folder, **options):
    path = folder / 'recipe.yaml'
    path.write_text(yaml.safe_dump(options))
    return str(path)


def test_flags_win_over_yaml_and_yaml_over_defaults(script, tmp_path):
    recipe = write_yaml(tmp_path, **{'data-dir': '/photos', 'epochs': 7, 'lr_base': '1e-2', 'opt': 'lamb'})
    config = script.parse_config(['--config', recipe, '--epochs', '9'])
    assert (config.epochs, config.data_dir, config.lr_base, config.opt) == (9, '/photos', 0.01, 'lamb')
    assert (config.model, config.batch_size, config.weight_decay) == ('resnet50', 128, 2e-5)


def test_a_flag_can_undo_what_a_yaml_file_turns_on(script, tmp_path):
    recipe = write_yaml(tmp_path, data_dir='/photos', model_ema=True, clip_grad=1.0)
    assert script.parse_config(['-c', recipe]).model_ema
    assert not script.parse_config(['-c', recipe, '--no-model-ema']).model_ema


def test_timms_defaults_hold(script):
    """As timm's train.py has them, except label smoothing and colour jitter, which the papers do not use."""
    config = script.parse_config(['--data-dir', '/photos'])
    expected = dict(
        model='resnet50', batch_size=128, opt='sgd', momentum=0.9, weight_decay=2e-5, clip_grad=None, clip_mode='norm',
        sched='cosine', lr=None, lr_base=0.1, lr_base_size=256, lr_base_scale=None, warmup_lr=1e-5, min_lr=0.0,
        epochs=300, warmup_epochs=5, cooldown_epochs=0, decay_rate=0.1, hflip=0.5, scale=[0.08, 1.0],
        dist_bn='reduce', model_ema_decay=0.9998, seed=42, log_interval=50, checkpoint_hist=10, workers=4,
        eval_metric='top1', output='./output/train', amp_dtype='float16', drop=0.0, smoothing=0.0, color_jitter=0.0,
        mix='none', loader='auto')
    assert {key: getattr(config, key) for key in expected} == expected


def test_an_unknown_flag_names_the_near_ones(refusal):
    assert '--warmup-epoch; did you mean --warmup-epochs' in refusal('--warmup-epoch', '3')
    assert '--mixx=alignmix; did you mean --mix' in refusal('--mixx=alignmix')
    assert 'did you mean' not in refusal('--zzzzzzzz')


def test_an_unknown_yaml_key_names_the_near_ones(refusal, tmp_path):
    message = refusal('-c', write_yaml(tmp_path, warmup_epoch=3, qqqq=1))
    assert "'warmup_epoch'; did you mean warmup_epochs" in message and "'qqqq'" in message


@pytest.mark.parametrize('text, said', [
    ('- 1\n- 2\n', 'must hold a mapping'),
    ('a: [1\n', 'is not YAML'),
    ('epochs: many\n', '--epochs takes int values'),
    ('epochs: 1.5\n', '--epochs takes int values'),
    ('sched: cosinus\n', '--sched must be one of'),
    ('scale: [0.1]\n', '--scale takes 2 values'),
    ('mix_kwargs: [1]\n', '--mix-kwargs takes key=value pairs'),
    ('model_ema: sometimes\n', '--model-ema takes bool values'),
    ('smoothing: 1.0\n', '--smoothing must be smaller than 1'),
    ('batch_size: 0\n', '--batch-size must be at least 1'),
    ('decay_milestones: [22, 16]\n', '--decay-milestones must increase'),
    ('resume: auto\n', '--resume auto looks in the folder of --experiment'),
])
def test_a_wrong_yaml_file_is_refused_by_option(refusal, tmp_path, text, said):
    path = tmp_path / 'recipe.yaml'
    path.write_text(text)
    assert said in refusal('-c', str(path))


def test_a_missing_yaml_file_is_refused(refusal, tmp_path):
    assert 'no such file' in refusal('-c', str(tmp_path / 'none.yaml'))


def test_mix_kwargs_of_a_recipe_read_numbers_as_flags_do(script, tmp_path):
    path = tmp_path / 'recipe.yaml'
    path.write_text('data_dir: x\nmix: multimix\nmix_kwargs: {alpha: [1e-1, 2], m: 3}\n')
    assert script.parse_config(['-c', str(path)]).mix_kwargs == {'alpha': [0.1, 2], 'm': 3}


def test_mix_kwargs_read_numbers_tuples_and_names(script):
    words = ['alpha=1.5', 'mode_probs=(0.5,0.25,0.25)', 'iterations=50', 'per_example=True', 'align_at=layer3']
    options = script.parse_config(['--data-dir', 'x', '--mix', 'alignmix', '--mix-kwargs', *words]).mix_kwargs
    assert options == dict(
        alpha=1.5, mode_probs=(0.5, 0.25, 0.25), iterations=50, per_example=True, align_at='layer3')
    assert options['per_example'] is True and isinstance(options['iterations'], int)
    mix = timm_alignmix.create_mix('alignmix', **options)
    assert (mix.alpha, mix.iterations, mix.per_example, mix.align_at) == (1.5, 50, True, 'layer3')
    assert list(mix.probs.values()) == pytest.approx([0.5, 0.25, 0.25])


def test_mix_kwargs_from_yaml_make_the_same_mix(script, tmp_path):
    recipe = write_yaml(tmp_path, data_dir='x', mix='alignmix', mix_kwargs={'mode_probs': [0.5, 0.25, 0.25]})
    options = script.parse_config(['-c', recipe]).mix_kwargs
    from_flags = timm_alignmix.create_mix('alignmix', mode_probs=(0.5, 0.25, 0.25))
    assert timm_alignmix.create_mix('alignmix', **options).probs == from_flags.probs


def test_several_methods_from_flags_and_from_yaml(script, tmp_path):
    words = ['--mix', 'mixup=0.5', 'cutmix=0.3', 'none=0.2', '--mix-kwargs', 'mixup.alpha=0.8', 'cutmix.alpha=1.0']
    mix, kwargs = {'mixup': 0.5, 'cutmix': 0.3, 'none': 0.2}, {'mixup.alpha': 0.8, 'cutmix.alpha': 1.0}
    config = script.parse_config(['--data-dir', 'x', *words, '--mix-prob', '0.5', '--mix-off-epoch', '7'])
    assert (config.mix, config.mix_kwargs, config.mix_prob, config.mix_off_epoch) == (mix, kwargs, 0.5, 7)
    assert config.mix_name == 'cutmix+mixup+none'
    assert timm_alignmix.create_mix(*config.mixing()[:1], **config.mixing()[1]).chances == pytest.approx(
        {'mixup': 0.25, 'cutmix': 0.15, 'none': 0.6})
    recipe = write_yaml(tmp_path, data_dir='x', mix=mix, mix_kwargs=kwargs)
    found = script.parse_config(['-c', recipe])
    assert (found.mix, found.mix_kwargs) == (mix, kwargs)
    # Options belong to the set of methods, whatever their weights.
    found = script.parse_config(['-c', recipe, '--mix', 'cut-mix=1', 'mixup=1', 'none=0'])
    assert (found.mix, found.mix_kwargs) == ({'cut-mix': 1, 'mixup': 1, 'none': 0}, kwargs)
    for others in (['cutmix'], ['mixup=1', 'cutmix=1']):
        assert script.parse_config(['-c', recipe, '--mix', *others]).mix_kwargs == {}


def test_a_variant_of_a_recipe_may_be_several_methods(script, refusal, tmp_path):
    recipe = write_yaml(tmp_path, data_dir='x', mix='few', mix_kwargs={'n': 5}, mixes={
        'few': {'mix': 'multimix'}, 'cutmix': {'epochs': 3}, 'deit': {
            'mix': {'mixup': 0.5, 'cutmix': 0.5}, 'mix_kwargs': {'mixup.alpha': 0.8}, 'epochs': 5}})
    config = script.parse_config(['-c', recipe, '--mix', 'deit'])
    assert (config.mix, config.mix_kwargs) == ({'mixup': 0.5, 'cutmix': 0.5}, {'mixup.alpha': 0.8})
    assert config.epochs == 5 and script.parse_config(['-c', recipe]).mix_kwargs == {'n': 5}
    assert script.parse_config(['-c', recipe, '--mix', 'mixup=1', 'cutmix=1']).epochs == 300
    assert "unknown mix 'few'" in refusal('-c', recipe, '--mix', 'few=1', 'mixup=1')


@pytest.mark.parametrize('words, said', [
    (('--mix', 'mixup', 'cutmix'), "--mix takes one method, or several with a weight each"),
    (('--mix', 'mixup=1', 'cutmix=-1'), '--mix mixup=1.0 cutmix=-1.0 cannot work .*a weight each'),
    (('--mix', 'mixup=nan', 'cutmix=1'), '--mix takes finite numbers'),
    (('--mix', 'mixup=1', 'cutmix=1', '--mix-kwargs', 'alpha=1.0'), 'such as cutmix.alpha'),
    (('--mix', 'mixup=1', 'none=1', '--mix-kwargs', 'mixup.per_example=3'), '--mix-kwargs mixup.per_example takes'),
    (('--mix', 'mixup', '--mix-prob', '1.5'), '--mix-prob 1.5 cannot work .*from 0 to 1'),
    (('--mix', 'mixup', '--mix-off-epoch', '-1'), '--mix-off-epoch must be at least 0'),
])
def test_several_methods_that_cannot_be_are_refused(refusal, words, said):
    message = ' '.join(refusal('--data-dir', 'x', *words).split())
    assert re.search(said, message), message


def test_mix_kwargs_without_equals_sign_are_refused(refusal):
    assert "--mix-kwargs takes key=value pairs, got 'alpha'" in refusal('--mix-kwargs', 'alpha', '2')


@pytest.mark.parametrize('opt, batch, expected', [
    ('sgd', 512, 0.1 * 2),
    ('lion', 512, 0.1 * 2),
    ('adamw', 512, 0.1 * math.sqrt(2)),
    ('nadamw', 64, 0.1 * math.sqrt(0.25)),
    ('lamb', 4096, 0.1 * math.sqrt(16)),
    ('LAMB', 4096, 0.1 * math.sqrt(16)),
    ('adafactor', 1024, 0.1 * math.sqrt(4)),
])
def test_the_learning_rate_scales_as_in_timm(opt, batch, expected):
    assert scaled_lr(TrainConfig(opt=opt), batch) == pytest.approx(expected, rel=1e-12)


def test_the_learning_rate_scale_can_be_chosen():
    assert scaled_lr(TrainConfig(opt='adamw', lr_base_scale='linear'), 1024) == pytest.approx(0.4)
    assert scaled_lr(TrainConfig(opt='sgd', lr_base=0.5, lr_base_size=64, lr_base_scale='sqrt'), 256) == 1.0
    assert scaled_lr(TrainConfig(lr=0.3, lr_base=7.0), 4096) == 0.3


def test_the_sample_has_its_own_settings_only_without_data_flags(tmp_path):
    sample = resolve_config({})
    assert (sample.model, sample.img_size, sample.epochs, sample.opt, sample.hflip) == (
        'resnet18', 64, 14, 'adamw', 0.0)
    assert resolve_config({'epochs': 3, 'model': 'resnet34'}).model == 'resnet34'
    recipe = write_yaml(tmp_path, seed=1)
    for config in (resolve_config({'data_dir': '/photos'}), resolve_config({'dataset': 'torch/cifar10'}),
                   resolve_config({}, recipe)):
        assert (config.model, config.img_size, config.epochs, config.opt, config.hflip) == (
            'resnet50', None, 300, 'sgd', 0.5)


@pytest.mark.parametrize('sched, at_half, at_end', [('wsd', 1.0, 1 - math.sqrt(9 / 10)), ('step', 1.0, 1.0)])
def test_decays_have_timms_default_lengths(sched, at_half, at_end):
    """wsd holds the rate and decays by 1 - sqrt over the last fifth of the epochs; step waits 90 epochs."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = TrainConfig(sched=sched, epochs=50, warmup_epochs=0)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(config))
    rates = []
    for epoch in (25, 49):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]['lr'])
    assert epochs == 50 and rates == pytest.approx([at_half, at_end])


def write_files(folder, **texts):
    for name, text in texts.items():
        (folder / f'{name}.yaml').write_text(text)
    return str(folder / f'{name}.yaml')


def test_a_recipe_stands_on_its_bases(script, tmp_path):
    """Nearest wins: flags, the file, its bases from the last to the first, the bases' own bases, the defaults.

    Options of another method than the chosen one are left out.
    """
    (tmp_path / 'sub').mkdir()
    write_files(tmp_path, root='lr: 0.5\nepochs: 9\nseed: 3\nmix_kwargs: {alpha: 1.0}\n')
    write_files(
        tmp_path / 'sub', first='base: ../root.yaml\nepochs: 8\nopt: lamb\n', second='{opt: adamw, dist-bn: ""}')
    recipe = write_files(
        tmp_path, recipe='base: [sub/first.yaml, sub/second.yaml]\nmix: mixup\nmix_kwargs: {alpha: 2}\n')
    config = script.parse_config(['-c', recipe, '--mix', 'cutmix'])
    assert (config.lr, config.epochs, config.opt, config.dist_bn, config.seed) == (0.5, 8, 'adamw', '', 3)
    assert (config.mix, config.mix_kwargs, config.batch_size) == ('cutmix', {'alpha': 1.0}, 128)
    assert script.parse_config(['-c', recipe, '--mix', 'Mix-Up']).mix_kwargs == {'alpha': 2}


@pytest.mark.parametrize('texts, said', [
    (dict(a='base: a.yaml\n'), 'the file is its own base'),
    (dict(a='base: b.yaml\n', b='base: a.yaml\n'), 'b.yaml -> '),
    (dict(a='base: gone.yaml\n'), 'gone.yaml (base of '),
    (dict(a='base: 7\n'), 'base must be a file or a list of files, got 7'),
    (dict(b='epoch: 3\n', a='base: b.yaml\n'), "b.yaml (base of "),
    (dict(a='bas: b.yaml\n'), "'bas'; did you mean base"),
])
def test_a_wrong_base_is_refused(refusal, tmp_path, texts, said):
    assert said in refusal('-c', write_files(tmp_path, **texts))


def test_one_base_may_be_shared(tmp_path):
    recipe = write_files(
        tmp_path, root='lr: 0.5\n', a='base: root.yaml\n', b='base: root.yaml\n', c='base: [a.yaml, b.yaml]')
    assert resolve_config({}, recipe).lr == 0.5
