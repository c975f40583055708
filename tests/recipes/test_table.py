"""The table of recipes/README.md: up to date, complete, and with the right figures and hours."""
import pytest

from alignmix_lab.classification import resolve_config
from tools import recipes_table

FOLDER = recipes_table.README.parent


def test_the_table_is_up_to_date(capsys):
    try:
        recipes_table.main(['--check'])
    except SystemExit as stale:
        pytest.fail(str(stale))


def test_a_stale_table_is_reported_and_written_again(tmp_path, monkeypatch):
    text = recipes_table.README.read_text(encoding='utf-8')
    readme = tmp_path / 'README.md'
    monkeypatch.setattr(recipes_table, 'README', readme)
    readme.write_text(text.replace('94.81 A1', '94.82 A1'), encoding='utf-8')
    with pytest.raises(SystemExit, match='is stale: run python tools/recipes_table.py'):
        recipes_table.main(['--check'])
    recipes_table.main([])
    assert readme.read_text(encoding='utf-8') == text


def test_every_recipe_has_a_row():
    files = {path.relative_to(FOLDER) for path in FOLDER.rglob('*.yaml') if path.name[0] != '_'}
    names = {path.with_suffix('').as_posix() for path in files if path.parts[0] != 'accelerate'}
    assert set(recipes_table.RECIPES) == names


@pytest.mark.parametrize('recipe, column, cell', [
    # AlignMixup, Table 1: error 5.19; MultiMix, Table 2: 95.41
    ('cifar10/preactresnet18_2000ep', 'none', '94.81 A1<br>95.41 M2<br>16 h'),
    ('cifar100/preactresnet18_300ep', 'alignmix', '78.62 A §4.2<br>2.5 h'),
    ('imagenet/resnet50_300ep', 'alignmix_ae', '81.17 A2<br>735 h'),
    ('cub200/vgg16_gap', 'none', '37.10 / 59.00 A5<br>17 h'),
    ('detection/ssd300_voc0712', 'densemultimix', '79.20 M5'),
    ('cifar100/wrn16_8_2000ep', 'alignmix_release', '81.23, 81.16 log<br>47 h'),
    ('imagenet/vit_small_300ep', 'alignmix_release', ''),
    ('modern/rsb_a3', 'cutmix', '78.1 R<br>78 h'),
])
def test_cells_hold_the_papers_figures(recipe, column, cell):
    header, _, *rows = [[word.strip() for word in line.split('|')] for line in recipes_table.table().splitlines()]
    row = next(row for row in rows if row[1].startswith(f'[{recipe}]'))
    assert row[header.index(f'`{column}`')] == cell


def test_our_own_figures_are_bold(monkeypatch):
    monkeypatch.setitem(recipes_table.OURS, ('cifar10/wrn16_8_300ep', 'multimix'), 96.5)
    assert '| **96.50**<br>6.7 h |' in recipes_table.table()


@pytest.mark.parametrize('recipe, mix, gflop, hours', [
    ('imagenet/resnet50_300ep', 'none', 8.18, 300 * 1281167 / 100 * 0.418 / 3600),
    ('imagenet/resnet50_300ep', 'alignmix', 8.18, 300 * 1281167 / 100 * 0.450 / 3600),
    ('imagenet/resnet50_300ep', 'densemultimix', 8.18, 300 * 1281167 / 100 * 0.418 / 3600 * 1.17 / 0.95),
    ('imagenet/resnet50_100ep', 'none', 8.18, (85 + 15 * (128 / 224) ** 2) * 1281167 / 100 * 0.418 / 3600),
    ('modern/ffcv_rn50_16ep', 'none', 8.18, (12 * 160**2 + 4 * 192**2) / 224**2 * 1281167 / 100 * 0.418 / 3600),
    # 5.87 TFLOP/s, what ResNet-50 sustains
    ('cifar10/preactresnet18_2000ep', 'none', 1.11, 2000 * 50000 * 3 * 1.11 / (300 * 8.18 / 0.418) / 3600),
])
def test_hours_by_hand(recipe, mix, gflop, hours):
    config = resolve_config({'mix': mix}, recipe)
    assert recipes_table.gpu_hours(config, gflop, mix) == pytest.approx(hours, rel=1e-9)
