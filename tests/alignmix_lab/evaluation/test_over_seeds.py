"""Differences between runs that differ in the seed, against scipy's paired t-test."""
import csv
import json

import numpy as np
import pytest
from scipy import stats

from alignmix_lab.evaluation.ablation import AblationOptions, ablate
from alignmix_lab.evaluation.over_seeds import paired_difference


@pytest.mark.parametrize('seeds', [2, 3, 10])
def test_the_interval_holds_for_any_number_of_seeds(seeds):
    ours, theirs = np.random.default_rng(seeds).normal(70, 2, (2, seeds))
    mean, half = paired_difference(dict(enumerate(ours)), dict(reversed([*enumerate(theirs)])))
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx(interval, rel=1e-9)


NONE, MIXUP = {'ece': [27.0, 28.0, 29.5], 'nll': [2.0, 1.9, 2.1]}, {'ece': [5.0, 4.5, 4.0], 'nll': [1.0, 2.5, 2.0]}


def write_results(folder, seeds: int = 3) -> None:
    """What `alignmix evaluate` writes, as far as it is read."""
    folder.mkdir()
    rows = [
        {'model': f'{mix}-seed{seed}', **{key: values[seed] for key, values in found.items()}}
        for mix, found in (('none', NONE), ('mixup', MIXUP)) for seed in range(seeds)]
    (folder / 'calibration.json').write_text(json.dumps({'rows': rows}))
    (folder / 'ood.json').write_text(json.dumps({'rows': [
        {'model': 'none-seed0', 'set': name, 'auroc': value} for name, value in (('dtd', 80.0), ('photos', 60.0))]}))


@pytest.fixture
def collect(tmp_path):
    options = AblationOptions(
        grid=['mix=none,mixup'], set=['model=test_resnet'], seeds=[0, 1, 2], output=str(tmp_path), collect=True,
        evaluated=str(tmp_path / 'evaluated'))
    return lambda: ablate(options, 'the command')


def test_results_of_protocols_are_added_up(tmp_path, collect):
    write_results(tmp_path / 'evaluated')
    collect()
    with (tmp_path / 'ablation-evaluated.csv').open(encoding='utf-8', newline='') as file:
        none, mixup = csv.DictReader(file)
    for key, title in (('ece', 'ECE (%)'), ('nll', 'NLL')):
        low, high = stats.ttest_rel(MIXUP[key], NONE[key]).confidence_interval(0.95)
        assert float(mixup[f'{title}, mean']) == pytest.approx(np.mean(MIXUP[key]))
        assert float(mixup[f'{title}, difference']) == pytest.approx((low + high) / 2)
        assert float(mixup[f'{title}, interval']) == pytest.approx((high - low) / 2)
        assert none[f'{title}, difference'] == ''
    page = (tmp_path / 'ablation-evaluated.md').read_text(encoding='utf-8')
    assert r'| none | 3 | 28.17 ± 1.26 | 80.00 | 60.00 | 2.00 ± 0.10 |' in page
    assert r'| mixup | 3 | 4.50 ± 0.50\* | - | - | 1.83 ± 0.76 |' in page  # the second interval has 0


def test_one_seed_has_no_deviation(tmp_path, collect):
    write_results(tmp_path / 'evaluated', seeds=1)
    collect()
    assert '| mixup | 1 | 5.00 | - | - | 1.00 |' in (tmp_path / 'ablation-evaluated.md').read_text(encoding='utf-8')


def test_a_folder_without_results_is_refused(collect):
    with pytest.raises(ValueError, match=r'has no result of runs such as none-seed0: .*--labels'):
        collect()
