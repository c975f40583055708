"""Published figures, and the page that shows results beside them."""
import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from alignmix_lab.evaluation import published
from alignmix_lab.evaluation.protocols.ood_sets import NOISES
from alignmix_lab.evaluation.published import MEASURES, OOD_SETS
from alignmix_lab.evaluation.report import Comparison, Row, compare, find_sources, main
from alignmix_lab.evaluation.result import Column, Result, table, write_result
from alignmix_lab.runs.plotting import figure

NASTY = '<script>alert("x & y")</script>'


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.links, self.ids, self.images, self.texts = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs['id']] if 'id' in attrs else []
        self.links += [attrs['href']] if 'href' in attrs else []
        self.images += [attrs['src']] if 'src' in attrs else []

    def handle_data(self, data):
        self.texts.append(data)


def write_evaluation(
        folder: Path,
        protocol: str,
        rows: list[dict],
        models: list[dict],
        columns: dict[str, Column] | None = None,
) -> None:
    """An evaluation's files, by the writer that evaluate.py has."""
    fig, _ = figure()
    columns = columns or {key: Column(key) for key in rows[0] if key != 'model'}
    facts = {
        'command': f'python evaluate.py {protocol} --model {NASTY}', 'data': 'val of shapes', 'options': {},
        'environment': {'date': '2026-01-01', 'device': 'a CPU', 'processes': 1, 'timm_alignmix': '0', 'timm': '1',
                        'torch': '2'},
        'models': models}
    write_result(folder, protocol, '', Result(columns, rows, ['A note.'], {}, {'': fig}), facts)


def model(label: str, mix: str, dataset: str = 'cifar100', epochs: int = 2000, **options) -> dict:
    return {'label': label, 'arch': 'preactresnet18', 'training': {
        'mix': mix, 'mix_options': options, 'dataset': dataset, 'epochs': epochs, 'accuracy': {'exported': 'best'}}}


def write_run(folder: Path, top1: list[float], report: str = '', **args) -> None:
    folder.mkdir(parents=True)
    args = {'model': 'preactresnet18', 'mix': 'none', 'dataset': 'torch/cifar100', 'epochs': len(top1), 'seed': 0,
            'eval_metric': 'top1', **args}
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    lines = [f'{epoch},{value}' for epoch, value in enumerate(top1)]
    (folder / 'summary.csv').write_text('\n'.join([f'epoch,eval_{args["eval_metric"]}', *lines, '']))
    if report:
        (folder / 'report.md').write_text(report)


def compare_runs(folder: Path) -> list[Comparison]:
    return compare(value for run in find_sources([folder]).runs for value in run.values)


def own_rows(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.rows if row.differs is None]


def published_rows(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.rows if row.differs is not None]


def png(color: int) -> bytes:
    """Some picture's bytes."""
    buffer = io.BytesIO()
    Image.new('RGB', (3, 3), (color, 0, 0)).save(buffer, 'PNG')
    return buffer.getvalue()


def test_published_figures_are_read_whole():
    assert len(published.figures()) == 756
    # From the papers: AlignMixup's Table 1 (error) and MultiMix's Tables 2 and 3.
    known = {
        ('A', 'Table 1', 'TinyImageNet', 'PreActResNet-18', 'AlignMixup/AE'): 32.73,
        ('M', 'Table 2', 'CIFAR-100', 'WRN-16-8', 'Dense MultiMix'): 81.77,
        ('M', 'Table 3', 'ImageNet', 'ViT-S/16', 'Dense MultiMix'): 76.1,
    }
    for (*setting, method), value in known.items():
        (found,) = [figure for figure in published.find(methods=[method], table=setting[1])
                    if figure.setting == tuple(setting) and not figure.metric.startswith('1000')]
        assert found.value == value


@pytest.mark.parametrize('protocol, tables', [
    ('accuracy', {'A Table 1', 'A Table 2', 'A Table 6', 'A Table 7', 'A Table 10', 'A section 4.2', 'A supplement C',
                  'M Table 2', 'M Table 3'}),
    ('robustness', {'A Table 3', 'M Table 4'}),
    ('calibration', {'A Table 9'}),
    ('ood', {'A Table 4', 'A Table 8'}),
    ('localization', {'A Table 5'}),
    ('embedding', {'M section 4.4'}),
    ('intrusion', {'M section 4.5'}),
    ('cost', {'A Table 2', 'M Table 3'}),
    ('detection', {'M Table 5'}),
])
def test_every_protocol_finds_its_tables(protocol, tables):
    measures = [measure for measure in MEASURES if measure.protocol == protocol]
    found = [figure for measure in measures for figure in published.find(metrics=measure.metrics)]
    assert {f'{figure.paper} {figure.table}' for figure in found} == tables
    assert all(published.find(metrics=measure.metrics) for measure in measures)
    if protocol == 'ood':
        datasets = {figure.dataset.partition(' vs ')[2] for figure in found}
        assert set(OOD_SETS.values()) == datasets
        assert {name.lower() for name in NOISES.values() if '+' not in name} <= OOD_SETS.keys()


def test_no_published_setting_is_out_of_reach():
    metrics = {metric for measure in MEASURES for metric in measure.metrics}
    assert {figure.setting for figure in published.figures()} == {f.setting for f in published.find(metrics=metrics)}
    assert {figure.metric for figure in published.figures()} - metrics == {'images/s'}  # of detectors, not measured


def test_what_differs_is_named():
    (one,) = [f for f in published.find(table='Table 2', paper='M', methods=['MultiMix'])
              if (f.dataset, f.network) == ('CIFAR-10', 'PreActResNet-18')]
    assert published.differences(one, 'CIFAR-10', 'PreActResNet-18', 2000) == {}
    assert published.differences(one, 'CIFAR-100', 'PreActResNet-18', 2000) == {'data': 'CIFAR-100, not CIFAR-10'}
    assert set(published.differences(one, 'clothing', 'ResNet-18', None)) == {'data', 'network', 'epochs'}
    (short,) = published.find(table='section 4.2', methods=['AlignMixup'])
    assert published.differences(short, 'CIFAR-100', 'PreActResNet-18', 300) == {}


def test_comparison_by_hand(tmp_path):
    write_evaluation(tmp_path, 'accuracy', [{'model': 'a', 'top1': 75.0}, {'model': 'b', 'top1': 80.0},
                                            {'model': 'c', 'top1': 82.0}, {'model': 'd', 'top1': 1.0}],
                     [model('a', 'none'), model('b', 'multimix', n=1000), model('c', 'multimix', n=1000),
                      model('d', 'multimix', n=10)])
    (comparison,) = find_sources([tmp_path]).evaluations[0].comparisons
    assert comparison.methods == ['baseline', 'MultiMix', 'MultiMix (n=10)'] and comparison.reproduces
    ours, *theirs = comparison.rows
    assert ours.values == {'baseline': 75.0, 'MultiMix': 81.0, 'MultiMix (n=10)': 1.0}
    assert ours.where == 'here, best epoch, means of up to 2'
    by_place = {row.where: row for row in theirs}
    multimix = by_place['MultiMix, Table 2: CIFAR-100, PreActResNet-18']
    assert multimix.values == {'baseline': 76.69, 'MultiMix': 81.82} and multimix.differs == {}
    alignmixup = by_place['AlignMixup, Table 1: CIFAR-100, PreActResNet-18 (100 - error)']
    assert alignmixup.values == {'baseline': 76.76}  # printed as an error of 23.24


def test_ood_sets_intrusion_and_cost_are_told_apart(tmp_path):
    aurocs = {'uniform noise': 60.0, 'textures': 70.0}
    rows = [{'model': 'a', 'set': name, 'auroc': value} for name, value in aurocs.items()]
    write_evaluation(tmp_path / '1', 'ood', rows, [model('a', 'alignmix')])
    write_evaluation(tmp_path / '2', 'intrusion', [
        {'model': 'a', 'mixup': 0.5, 'multimix': None}, {'model': 'b', 'mixup': 0.7, 'multimix': None}],
        [model('a', 'none'), model('b', 'mixup')])
    write_evaluation(
        tmp_path / '3', 'cost', [{'model': 'resnet50 224 px', 'mix': 'none', 'images_s': 1500.0, 'ms': 10.0}], [])
    ood, intrusion, cost = (found.comparisons[0] for found in find_sources([tmp_path]).evaluations)
    assert [row.values['AlignMixup'] for row in ood.rows] == [60.0, 89.1]
    # Networks trained with different methods are no repetitions of one measurement.
    assert [(row.where.rpartition(', ')[2], row.values['input mixup']) for row in own_rows(intrusion)] == [
        ('trained with none', 0.5), ('trained with mixup', 0.7)]
    assert (intrusion.methods, intrusion.rows[2].values) == (['input mixup'], {'input mixup': 0.46})
    assert 'scale of the embeddings (not stated)' in intrusion.rows[2].differs and not intrusion.reproduces
    speeds = [row for row in cost.rows if row.quantity == '1000 images/s']
    assert [row.values['baseline'] for row in speeds] == [1.5, 1.17, 1.01]  # of ResNet-50 and of ViT-S/16
    assert [row.differs and set(row.differs) for row in speeds] == [None, {'hardware'}, {'hardware', 'network'}]
    assert cost.title == 'ResNet-50' and [row.near for row in speeds] == [False, True, False]


def test_runs_that_are_not_finished_are_not_compared(tmp_path):
    write_run(tmp_path / 'a', [50.0, 70.0, 60.0])
    write_run(tmp_path / 'b', [50.0], epochs=3)
    write_run(tmp_path / 'c', [], epochs=3)
    found = find_sources([tmp_path])
    assert [run.finished for run in found.runs] == [True, False, False]
    (comparison,) = compare_runs(tmp_path)
    assert [row.values for row in own_rows(comparison)] == [{'baseline': 60.0}, {'baseline': 70.0}]
    assert not comparison.reproduces and all('epochs' in row.differs for row in published_rows(comparison))


def test_detectors_are_compared_by_the_weights_of_their_backbone(tmp_path):
    for mix, value in (('none', 40.0), ('densemultimix', 50.0), ('alignmix_ae', 60.0)):
        write_run(tmp_path / mix, [value], eval_metric='voc07_11pt', detector='ssd', backbone='resnet50',
                  dataset='voc', train_split='2007_trainval+2012_trainval', data_dir='/data/VOCdevkit',
                  weights=f'/runs/photos-{mix}-0/last.pth.tar')
    (comparison,) = compare_runs(tmp_path)
    assert comparison.methods == ['baseline', 'AlignMixup/AE', 'Dense MultiMix']
    assert comparison.rows[0].values == {'baseline': 40.0, 'AlignMixup/AE': 60.0, 'Dense MultiMix': 50.0}
    (theirs,) = published_rows(comparison)  # not that of COCO
    assert theirs.values == {'baseline': 76.7, 'Dense MultiMix': 79.2} and theirs.differs == {}


def test_page_shows_everything_and_runs_nothing(tmp_path):
    write_evaluation(tmp_path / 'eval', 'accuracy', [{'model': NASTY, 'top1': 75.125}], [model(NASTY, 'none')])
    write_evaluation(tmp_path / 'eval' / 'more', 'accuracy', [{'model': 'a', 'top1': 1.5}], [])
    write_run(tmp_path / 'runs' / NASTY.replace('/', ''), [50.0, 60.0], report=(
        f'# {NASTY}\n\n    train_imagenet.py --mix none\n\n- Hardware: one GPU\n- Software: torch 2\n'))
    (tmp_path / 'runs' / NASTY.replace('/', '') / 'curves.png').write_bytes(png(1))
    write_run(tmp_path / 'runs' / 'other', [40.0, 70.0], mix='mixup')
    (tmp_path / 'loose.jpg').write_bytes(png(2))
    (tmp_path / 'notes.md').write_text(f'# {NASTY}')
    (tmp_path / 'broken.json').write_text('{')
    page_file = tmp_path / 'page' / 'report.html'
    main([str(tmp_path), str(tmp_path / 'eval'), '-o', str(page_file), '--title', NASTY])

    text = page_file.read_text()
    page = Page(text)
    assert 'script' not in page.tags and 'link' not in page.tags and 'http' not in ''.join(page.links + page.images)
    written = {path.read_bytes() for path in tmp_path.rglob('*') if path.suffix in ('.png', '.jpg')}
    shown = [base64.b64decode(source.partition('base64,')[2]) for source in page.images]
    # Every picture once (two evaluations have the same), and the curves of the two runs together.
    assert written <= set(shown) and len(shown) == 2 + 1 + 1 + 1
    assert all(link.removeprefix('#') in page.ids for link in page.links) and len(page.links) > 6
    words = ' '.join(page.texts)
    for said in (NASTY, '75.12', 'train_imagenet.py --mix none', 'one GPU', 'A note.', 'Not a reproduction', 'a CPU',
                 'other/args.yaml', 'python evaluate.py accuracy'):
        assert said in words, said


def test_nothing_to_show_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match='nothing to report'):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match='is not a folder'):
        main([str(tmp_path / 'absent')])


def test_ablations_show_their_commands(tmp_path):
    write_evaluation(tmp_path, 'ablation-n', [{'model': 'a', 'n': '1', 'last': 50.0}], [])
    file = tmp_path / 'ablation-n.json'
    data = json.loads(file.read_text())
    data['details'] = {'runs': [{'command': 'python train_imagenet.py --seed 7'}]}
    file.write_text(json.dumps(data))
    main([str(tmp_path), '-o', str(tmp_path / 'r.html')])
    assert 'python train_imagenet.py --seed 7' in (tmp_path / 'r.html').read_text()


def test_published_figures_of_other_settings_are_collapsed(tmp_path):
    """The nearest published lines are shown; where nothing is in common, none."""
    def shown(*runs) -> tuple[list[str], list[str]]:
        folder = tmp_path / '-'.join(f'{run.get("model", "same")}{run["epochs"]}' for run in runs)
        for i, run in enumerate(runs):
            write_run(folder / f'{i}', [50.0] * run['epochs'], **run)
        (comparison,) = compare_runs(folder)
        sides = [[row for row in comparison.select(near) if row.differs is not None] for near in (True, False)]
        assert len(sides[0]) + len(sides[1]) == len(published_rows(comparison))
        assert all(row.differs is None for side in (True, False) for row in comparison.select(side)[:2])  # ours on top
        main([str(folder), '-o', str(folder / 'r.html')])
        text = (folder / 'r.html').read_text()
        open_, _, folded = text.partition('<summary>Published figures of other settings')
        for side, part in zip(sides, (open_, folded), strict=True):
            assert all(f'<td>{row.where}</td>' in part for row in side)
        return tuple([row.where for row in side] for side in sides)

    near, others = shown({'epochs': 2000})
    assert all('CIFAR-100, PreActResNet-18' in where for where in near) and near
    assert any('WRN-16-8' in where for where in others) and any('TinyImageNet' in where for where in others)
    near, others = shown({'epochs': 3})
    assert all('CIFAR-100' in where and 'PreActResNet-18' in where for where in near) and near
    near, others = shown({'epochs': 3, 'model': 'test_resnet', 'dataset': 'clothing'})
    assert near == [] and others


@pytest.mark.parametrize('name, papers', [
    ('torch/cifar10', 'CIFAR-10'), ('/data/cifar10/', 'CIFAR-10'), ('CIFAR-10', 'CIFAR-10'),
    ('/data/tiny-imagenet-200', 'TinyImageNet'), ('CUB_200_2011', 'CUB-200-2011'), ('in1k', 'ImageNet'),
    *((name, published.SAMPLE) for name in (
        None, '', 'digits', published.SAMPLE, '/cache/digits-images-v1', '/cache/digits-ffcv-v1')),
    ('/data/clothing_160', 'clothing_160'), ('clothing_160', 'clothing_160'),
])
def test_names_of_data_sets(name, papers):
    assert published.dataset_name(name) == papers


def test_one_data_set_under_two_names_is_one(tmp_path):
    write_run(tmp_path / 'a', [50.0], dataset='torch/cifar10')
    write_run(tmp_path / 'b', [60.0], dataset='', data_dir='/data/cifar10')
    write_run(tmp_path / 'c', [70.0], dataset='')
    write_run(tmp_path / 'd', [80.0], dataset='', data_dir='/cache/digits-images-v1')
    cifar, digits = compare_runs(tmp_path)
    assert cifar.title.startswith('CIFAR-10, ') and own_rows(cifar)[0].values == {'baseline': 55.0}
    assert digits.title.startswith(published.SAMPLE) and own_rows(digits)[0].values == {'baseline': 75.0}


def test_columns_keep_their_format(tmp_path):
    rows = [{'model': 'a', 'loss': 0.5, 'speed': 1234.5, 'count': 7},
            {'model': 'b', 'loss': 0.25, 'speed': 99, 'count': 8}]
    columns = {'loss': Column('loss', '.4f', 'lower'), 'speed': Column('speed', '+.1f'), 'count': Column('count', 'd')}
    write_evaluation(tmp_path, 'accuracy', rows, [], columns)
    found = find_sources([tmp_path]).evaluations[0]
    assert found.cells[1] == [('b', False), ('0.2500', True), ('+99.0', False), ('8', False)]
    file = tmp_path / 'accuracy.json'
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, 'columns': {key: column.title for key, column in columns.items()}}))
    found = find_sources([tmp_path]).evaluations[0]  # as older versions wrote it
    assert [[text for text, _ in row] for row in found.cells] == [
        ['a', '0.5000', '1234.5', '7'], ['b', '0.2500', '99.0', '8']]


@pytest.mark.parametrize('content', [
    '"protocol"', '["protocol"]', '{"protocol": "http", "port": 80}', '{"protocol": 1, "columns": [], "rows": []}',
    '{"protocol": "accuracy", "columns": {"top1": "x"}, "rows": [1]}', '{"protocol"', '[' * 100_000 + '"protocol"',
    '{"protocol": "accuracy", "columns": {"top1": {"name": "x"}}, "rows": []}',
    '{"protocol": "accuracy", "columns": {"a": {"title": "a", "format": "no"}}, "rows": [{"a": 1.5}]}',
    '{"protocol": "accuracy", "columns": {"a": "a"}, "rows": [{"model": [1], "a": 1e999}], "models": [{"label": 3}]}',
    '{"protocol": "accuracy", "columns": {}, "rows": [], "options": [1], "notes": 5}',
])
def test_json_of_other_programs(tmp_path, content, caplog):
    write_run(tmp_path / 'ours', [75.0])
    (tmp_path / 'theirs.json').write_text(content)
    (tmp_path / 'silent.json').write_text('{"a": [1')
    (tmp_path / 'bytes.json').write_bytes(b'\xff\xfe\x00')
    main([str(tmp_path), '-o', str(tmp_path / 'r.html')])
    assert 'theirs.json is left out: it is not a result' in caplog.text and caplog.text.count('left out') == 1
    text = (tmp_path / 'r.html').read_text()
    assert '75.00' in text and 'theirs.json is left out' in text


@pytest.mark.parametrize('args, summary', [
    (None, b'a,b\n1,2\n'),
    (b'- a list', b'epoch,eval_top1\n0,1\n'),
    (b'{model: x', b'epoch,eval_top1\n0,1\n'),
    (b'model: resnet18\nmix: none', b'epoch,eval_top1\n0,1\n'),
    (b'model: resnet18\nmix: none\nepochs: many', b'epoch,eval_top1\n0,1\n'),
    (b'model: resnet18\nmix: none\nepochs: 1', b'\xff\xfe'),
    (b'\xff\xfe\x00', b'epoch,eval_top1\n0,1\n'),
])
def test_csv_of_other_programs(tmp_path, args, summary, caplog):
    write_run(tmp_path / 'ours', [50.0, 60.0])
    (tmp_path / 'theirs').mkdir()
    (tmp_path / 'theirs' / 'summary.csv').write_bytes(summary)
    if args is not None:
        (tmp_path / 'theirs' / 'args.yaml').write_bytes(args)
    (tmp_path / 'theirs' / 'other.csv').write_bytes(b'\x00\xff,,\n"')
    main([str(tmp_path), '-o', str(tmp_path / 'r.html')])
    assert 'theirs/summary.csv is left out' in caplog.text and '60.00' in (tmp_path / 'r.html').read_text()


def test_runs_that_are_cut_or_of_timm(tmp_path):
    """Lines that are being written, columns without numbers, and timm's own train.py, whose method is not known."""
    write_run(tmp_path / 'a', [50.0, 60.0])
    with (tmp_path / 'a' / 'summary.csv').open('a') as file:
        file.write('2,nan\n3,')
    write_run(tmp_path / 'b', [70.0])
    args = yaml.safe_load((tmp_path / 'b' / 'args.yaml').read_text())
    (tmp_path / 'b' / 'args.yaml').write_text(yaml.safe_dump({k: v for k, v in args.items() if k != 'mix'}))
    cut, timms = find_sources([tmp_path]).runs
    assert (cut.done, cut.last['epoch'], cut.best['top1']) == (4, 1, 60.0)
    assert timms.method == 'unknown' and compare(timms.values) == []


def test_folders_of_many_pictures_are_data(tmp_path):
    write_run(tmp_path / 'run', [50.0])
    for i in range(51):
        path = tmp_path / 'images' / f'{i}.png'
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(i))
    found = find_sources([tmp_path])
    assert found.pictures == {} and '51 pictures' in found.left_out[0]


@pytest.mark.parametrize('values, errors, best', [
    ([70.0, 60.0], [2.0, 2.0], [0]),
    ([70.0, 67.5], [2.0, 2.0], []),  # the difference has a standard error of 2.83
    ([70.0, 67.0], [2.0, 2.0], [0]),
    ([70.0, 70.0, 60.0], [2.0, 2.0, 2.0], [0, 1]),
    ([70.0, 70.0], [2.0, 2.0], []),
    ([70.0, 69.9], [None, None], [0]),
    ([100.0, 99.0], [0.0, 1.0], []),
    ([None, 60.0, 70.0], [2.0, 2.0, 2.0], [2]),
])
def test_best_within_the_standard_error_is_not_marked(values, errors, best):
    rows = [{'model': str(i), 'top1': v, 'error': e} for i, (v, e) in enumerate(zip(values, errors, strict=True))]
    lines = table(Result({'top1': Column('top-1', '.2f', 'higher', 'error')}, rows)).splitlines()[2:]
    assert [i for i, line in enumerate(lines) if '**' in line] == best
    lines = table(Result({'top1': Column('top-1', '.2f', 'higher')}, rows)).splitlines()[2:]
    assert any('**' in line for line in lines)
