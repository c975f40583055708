"""Recipes: found by path and by name, one method chosen from them, the nearer wins."""
import pytest

from alignmix_lab.classification import resolve_config
from alignmix_lab.runs import options
from alignmix_lab.runs.options import find_recipe, recipe_mixes

BASE = '''
lr: 0.5
batch_size: 32
mixes:
  multimix: {batch_size: 64, epochs: 7}
  Align-Mix: {epochs: 8}
  gentle: {mix: mixup, mix_kwargs: {alpha: 0.1}, epochs: 9}
'''


@pytest.fixture
def resolve(tmp_path):
    """Callable: the configuration of the last of some files, base.yaml being the first, under flags."""
    def run(flags=None, **texts: str):
        for name, text in {'base': BASE, **texts}.items():
            (tmp_path / f'{name}.yaml').write_text(text)
        return resolve_config(flags or {}, str(tmp_path / f'{[*texts, "base"][0]}.yaml'))
    return run


@pytest.mark.parametrize('mix, expected', [
    (None, ('none', 32, 300, {})),
    ('cutmix', ('cutmix', 32, 300, {})),
    ('multimix', ('multimix', 64, 7, {})),
    ('Multi_Mix', ('Multi_Mix', 64, 7, {})),
    ('alignmix', ('alignmix', 32, 8, {})),
    ('GENTLE', ('mixup', 32, 9, {'alpha': 0.1})),
])
def test_the_chosen_mix_brings_its_options(resolve, mix, expected):
    config = resolve({'mix': mix} if mix else {})
    assert (config.mix, config.batch_size, config.epochs, config.mix_kwargs) == expected
    assert config.lr == 0.5


def test_flags_win_over_the_entry_of_a_mix(resolve):
    config = resolve({'mix': 'gentle', 'epochs': 3, 'mix_kwargs': {'alpha': 2.0}})
    assert (config.mix, config.epochs, config.mix_kwargs) == ('mixup', 3, {'alpha': 2.0})


def test_entries_of_a_base_and_of_the_file_merge(resolve):
    own = 'base: base.yaml\nmixes: {gentle: {lr: 0.25}, multimix: {epochs: 5}}\n'
    config = resolve({'mix': 'gentle'}, own=own)
    assert (config.mix, config.epochs, config.lr, config.mix_kwargs) == ('mixup', 9, 0.25, {'alpha': 0.1})
    config = resolve({'mix': 'multimix'}, own=own)
    assert (config.batch_size, config.epochs) == (64, 5)


def test_a_file_wins_over_the_entries_of_its_base(resolve):
    config = resolve(own='base: base.yaml\nmix: multimix\nbatch_size: 16\n')
    assert (config.mix, config.batch_size, config.epochs) == ('multimix', 16, 7)
    config = resolve(own='base: base.yaml\nmix: gentle\nmix_kwargs: {alpha: 3.0}\n')
    assert (config.mix, config.epochs, config.mix_kwargs) == ('mixup', 9, {'alpha': 3.0})


def test_mix_kwargs_stay_with_their_method(resolve):
    own = 'base: base.yaml\nmix: multimix\nmix_kwargs: {n: 5}\n'
    assert resolve({'mix': 'MultiMix'}, own=own).mix_kwargs == {'n': 5}
    assert resolve({'mix': 'mixup'}, own=own).mix_kwargs == {}
    assert resolve({'mix': 'gentle'}, own=own).mix_kwargs == {'alpha': 0.1}
    assert resolve(top='base: own.yaml\nmix: cutmix\n', own=own).mix_kwargs == {}
    assert resolve({'mix': 'mixup'}, own='mix_kwargs: {alpha: 2.0}\n').mix_kwargs == {'alpha': 2.0}


def test_an_unknown_mix_names_the_methods_and_the_recipes_variants(resolve):
    with pytest.raises(ValueError, match=r"'gentel'; did you mean gentle\?; available: .*mixup.*; in the recipe .*: g"):
        resolve({'mix': 'gentel'})
    with pytest.raises(ValueError, match='unknown mix .mixxup.; did you mean mixup.*: no others'):
        resolve(own='mix: mixxup\n')


@pytest.mark.parametrize('text, said', [
    ('mixes: [multimix]\n', 'mixes must map methods to mappings'),
    ('mixes: {multimix: 7}\n', 'mixes must map methods to mappings'),
    ('mixes: {multimix: {epoch: 7}}\n', "'epoch'; did you mean epochs"),
])
def test_wrong_mixes_are_refused(resolve, text, said):
    with pytest.raises(ValueError, match=said):
        resolve(own=text)


def test_a_recipe_is_found_by_name_and_is_a_base_by_name(resolve, tmp_path, monkeypatch):
    path = find_recipe('cifar100/preactresnet18_300ep')
    assert path == find_recipe('cifar100/preactresnet18_300ep.yaml') == find_recipe(str(path))
    monkeypatch.chdir(tmp_path)  # no clone
    assert path == find_recipe('recipes/cifar100/preactresnet18_300ep.yaml')
    config = resolve(own='base: cifar100/preactresnet18_300ep\nepochs: 3\n')
    assert (config.model, config.epochs, config.dataset) == ('preactresnet18', 3, 'torch/cifar100')
    assert recipe_mixes(str(path), type(config)) == ['puzzlemix', 'alignmix_release']


def test_an_unknown_recipe_names_the_near_ones_or_all(monkeypatch):
    with pytest.raises(ValueError, match='imagenet/resnet50_30ep.*; did you mean imagenet/resnet50_300ep'):
        find_recipe('imagenet/resnet50_30ep')
    with pytest.raises(ValueError, match='; recipes: cifar10/.*, modern/rsb_a3, .*tinyimagenet') as e:
        find_recipe('zzz')
    assert 'accelerate' not in str(e.value) and '_base' not in str(e.value) and '/_' not in str(e.value)
    monkeypatch.setattr(options, 'RECIPES', None)
    with pytest.raises(ValueError, match='recipes: not installed'):
        find_recipe('cifar100/preactresnet18_300ep')
