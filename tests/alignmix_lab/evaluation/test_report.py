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
from alignmix_lab.evaluation.report import compare_result, compare_runs, find_sources, main
from alignmix_lab.evaluation.report.compare import MEASURES, OOD_SETS
from alignmix_lab.evaluation.result import Column, Result, write_result
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


def write_evaluation(folder: Path, protocol: str, rows: list[dict], models: list[dict], picture: bool = True) -> None:
    """An evaluation's files, by the writer that evaluate.py has."""
    fig, _ = figure()
    columns = {key: Column(key) for key in rows[0] if key != 'model'}
    facts = {
        'command': f'python evaluate.py {protocol} --model {NASTY}', 'data': 'val of shapes', 'options': {},
        'environment': {'date': '2026-01-01', 'device': 'a CPU', 'processes': 1, 'timm_alignmix': '0', 'timm': '1',
                        'torch': '2'},
        'models': models}
    write_result(folder, protocol, '', Result(columns, rows, ['A note.'], {}, {'': fig} if picture else {}), facts)


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
    (comparison,) = compare_result(find_sources([tmp_path]).results[0])
    assert comparison.methods == ['baseline', 'MultiMix', 'MultiMix (n=10)'] and comparison.reproduces
    ours, *theirs = comparison.rows
    assert ours.values == [75.0, 81.0, 1.0] and ours.setting == 'here, best epoch, means of up to 2'
    by_setting = {row.setting: row for row in theirs}
    multimix = by_setting['MultiMix, Table 2: CIFAR-100, PreActResNet-18']
    assert multimix.values == [76.69, 81.82, None] and multimix.differs == {}
    alignmixup = by_setting['AlignMixup, Table 1: CIFAR-100, PreActResNet-18 (100 - error)']
    assert alignmixup.values == [76.76, None, None]  # printed as an error of 23.24
    assert not any('TinyImageNet, WRN' in name or 'ResNet-50' in name for name in by_setting)  # nothing in common


def test_ood_sets_intrusion_and_cost_are_told_apart(tmp_path):
    rows = [{'model': 'a', 'set': name, 'auroc': value} for name, value in (('uniform', 60.0), ('textures', 70.0))]
    write_evaluation(tmp_path / '1', 'ood', rows, [model('a', 'alignmix')])
    write_evaluation(tmp_path / '2', 'intrusion', [
        {'model': 'a', 'mixup': 0.5, 'multimix': None}, {'model': 'b', 'mixup': 0.7, 'multimix': None}],
        [model('a', 'none'), model('b', 'mixup')])
    write_evaluation(tmp_path / '3', 'cost', [{'model': 'x', 'mix': 'none', 'images_s': 1500.0, 'ms': 10.0}],
                     [{'label': 'x', 'arch': 'resnet50.a1_in1k'}])
    ood, intrusion, cost = (compare_result(result)[0] for result in find_sources([tmp_path]).results)
    assert [row.values for row in ood.rows] == [[60.0], [89.1]]
    # Networks trained with different methods are no repetitions of one measurement.
    assert [(row.setting.rpartition(', ')[2], row.values) for row in intrusion.rows if row.ours] == [
        ('trained with none', [0.5]), ('trained with mixup', [0.7])]
    assert (intrusion.methods, intrusion.rows[2].values) == (['input mixup'], [0.46])
    assert 'scale of the embeddings' in intrusion.rows[2].differs and not intrusion.reproduces
    speeds = [row.values for row in cost.rows if row.quantity == '1000 images/s']
    assert speeds == [[1.5], [1.17], [1.01]]  # of ResNet-50 and of ViT-S/16
    assert [set(row.differs) for row in cost.rows if row.quantity == '1000 images/s'] == [
        set(), {'hardware'}, {'hardware', 'network'}]


def test_runs_that_are_not_finished_are_not_compared(tmp_path):
    write_run(tmp_path / 'a', [50.0, 70.0, 60.0])
    write_run(tmp_path / 'b', [50.0], epochs=3)
    write_run(tmp_path / 'c', [], epochs=3)
    found = find_sources([tmp_path])
    assert [run.finished for run in found.runs] == [True, False, False]
    (comparison,) = compare_runs(found.runs)
    assert [row.values for row in comparison.rows if row.ours] == [[60.0], [70.0]]
    assert not comparison.reproduces and all('epochs' in row.differs for row in comparison.rows if not row.ours)


def test_detectors_are_compared_by_the_weights_of_their_backbone(tmp_path):
    for mix, value in (('none', 40.0), ('densemultimix', 50.0), ('alignmix_ae', 60.0)):
        write_run(tmp_path / mix, [value], eval_metric='voc07_11pt', detector='ssd', backbone='resnet50',
                  dataset='voc', data_dir='/data/VOC07', weights=f'/runs/photos-{mix}-0/last.pth.tar')
    (comparison,) = compare_runs(find_sources([tmp_path]).runs)
    assert comparison.methods == ['baseline', 'AlignMixup/AE', 'Dense MultiMix']
    assert comparison.rows[0].values == [40.0, 60.0, 50.0]
    assert [row.values for row in comparison.rows if not row.ours] == [[76.7, None, 79.2]]  # not that of COCO


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
    with pytest.raises(SystemExit, match='is no folder'):
        main([str(tmp_path / 'absent')])


def test_ablations_show_their_commands(tmp_path):
    write_evaluation(tmp_path, 'ablation-n', [{'model': 'a', 'n': '1', 'last': 50.0}], [])
    file = tmp_path / 'ablation-n.json'
    data = json.loads(file.read_text())
    data['details'] = {'runs': [{'command': 'python train_imagenet.py --seed 7'}]}
    file.write_text(json.dumps(data))
    main([str(tmp_path), '-o', str(tmp_path / 'r.html')])
    assert 'python train_imagenet.py --seed 7' in (tmp_path / 'r.html').read_text()
