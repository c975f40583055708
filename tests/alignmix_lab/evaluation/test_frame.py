"""Models by name, folder and checkpoint; accuracy; the files; what does not fit; the command line; two processes."""
import csv
import importlib.util
import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers import resample_abs_pos_embed

from alignmix_lab.classification import TrainConfig
from alignmix_lab.evaluation import EvalConfig, NotApplicable, base, evaluate, options_class, register_protocol, resolve
from alignmix_lab.evaluation.models import open_models, short_labels
from alignmix_lab.evaluation.result import Column, Result
from alignmix_lab.evaluation.runner import command_line
from alignmix_lab.runs.options import Options, config_option, create_parser, parse_flags
from timm_alignmix import weights

ROOT = Path(__file__).resolve().parents[3]
CLASSES = ('blob', 'cross', 'stripe')
CPU = torch.device('cpu')


def test_accuracy(run, logits, pixels):
    labels = torch.from_numpy(pixels[1])
    found = run('accuracy')
    assert [row['model'] for row in found['rows']] == ['a', 'b']
    for row, own in zip(found['rows'], logits, strict=True):
        top1 = (own.argmax(1) == labels).double().mean().item()
        assert row['top1'] == pytest.approx(100 * top1)
        assert row['top1_error'] == pytest.approx(100 * (top1 * (1 - top1) / 15) ** 0.5)
        assert (row['top5'], row['images']) == (100, 15)
        assert row['loss'] == pytest.approx(torch.nn.functional.cross_entropy(own, labels).item(), rel=1e-4)
    assert found['data'].endswith('validation: 15 images')


@pytest.mark.parametrize('protocol, keys', [
    ('accuracy', ['top1', 'top5']), ('calibration', ['top1']), ('robustness', ['clean', 'fgsm', 'pgd'])])
def test_shares_of_images_have_standard_errors(run, protocol, keys):
    options = dict(pgd_iterations=1, pgd_curve=[4], fgsm_curve=[8]) if protocol == 'robustness' else {}
    found = run(protocol, **options)
    assert [key for key, column in found['columns'].items() if column['error']] == keys
    for row in found['rows']:
        for key in keys:
            share = row[key] / 100
            assert row[found['columns'][key]['error']] == pytest.approx(100 * (share * (1 - share) / 15) ** 0.5)


def test_top_k_of_many_classes():
    """A rank is the number of classes before the true one: as torch's topk counts."""
    from alignmix_lab.evaluation.predictions import Predictions, summarize
    logits, labels = torch.randn(50, 12), torch.randint(0, 12, (50,))
    found = Predictions(**{key: value.numpy() for key, value in summarize(logits, labels, 'net').items()})
    for k in (1, 3, 5):
        hits = (logits.topk(k).indices == labels[:, None]).any(1)
        assert found.top(k) == pytest.approx(100 * hits.double().mean().item())


@pytest.fixture
def checkpoint(networks, tmp_path):
    """Callable: a training checkpoint of the first network; changes to its entries."""
    def write(path, **changes):
        args = TrainConfig(model='test_resnet', img_size=32, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3], crop_pct=1.0,
                           interpolation='bilinear', mix='mixup').to_dict()
        state = {
            'arch': 'test_resnet', 'epoch': 2, 'args': args, 'state_dict': networks[0].state_dict(), 'optimizer': {},
            'metric': 61.25, 'metrics': {'loss': 1.5, 'top1': 61.25, 'top5': 91.0},
            'saver': {'best': {'epoch': 1, 'loss': 1.4, 'top1': 63.75, 'top5': 90.0}},
            'data_config': {'class_names': list(CLASSES)},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**state, **changes}, path)
        return path
    return write


def test_ways_to_name_a_model(models, networks, checkpoint, tmp_path):
    file = checkpoint(tmp_path / 'runs' / 'one' / 'last.pth.tar')
    shutil.copy(file, file.with_name('model_best.pth.tar'))
    torch.save(networks[0].state_dict(), tmp_path / 'plain.pth')
    names = [models[0], f'local-dir:{models[0]}', str(file), str(file.parent)]
    opened = open_models(EvalConfig(model=names), CPU)
    assert len({model.label for model in opened}) == 5
    assert len({model.fingerprint for model in opened}) == 1
    assert opened[2].training['mix'] == 'mixup' and opened[0].class_names == opened[2].class_names == list(CLASSES)
    named = open_models(EvalConfig(
        model=['test_resnet'], checkpoint=[str(tmp_path / 'plain.pth')], num_classes=3, img_size=48), CPU)[0]
    assert named.data_config['input_size'] == (3, 48, 48)
    for model in (*opened, named):
        for key, value in networks[0].state_dict().items():
            assert torch.equal(model.network.network.state_dict()[key], value)
    other = open_models(EvalConfig(model=models[1:], labels=['mine']), CPU)[0]
    assert other.label == 'mine' and other.fingerprint != opened[0].fingerprint
    random = open_models(EvalConfig(model=['test_resnet'], pretrained=False), CPU)[0]
    assert random.num_classes == 1000 and random.class_names is None


def test_vits_are_built_for_the_images(tmp_path):
    torch.manual_seed(0)
    trained = timm.create_model('vit_tiny_patch16_224', num_classes=3)
    folder = weights.export(trained, tmp_path / 'vit', license='unknown')
    small = timm.create_model('vit_tiny_patch16_224', num_classes=3, img_size=64)
    torch.save(small.state_dict(), tmp_path / 'vit64.pth')
    for options in (dict(model=['vit_tiny_patch16_224'], pretrained=False), dict(model=[str(folder)]),
                    dict(model=['vit_tiny_patch16_224'], checkpoint=[str(tmp_path / 'vit64.pth')], num_classes=3)):
        model = open_models(EvalConfig(img_size=64, **options), CPU)[0]
        assert model.network.network.patch_embed.img_size == (64, 64)
        assert model.network(torch.rand(1, 3, 64, 64)).isfinite().all()
    # The exported table of positions is resized as timm does it; a size of its own leaves it as it is.
    expected = resample_abs_pos_embed(trained.pos_embed, (4, 4))
    resized, own = (open_models(EvalConfig(img_size=side, model=[str(folder)]), CPU)[0] for side in (64, 224))
    torch.testing.assert_close(resized.network.network.pos_embed, expected)
    assert torch.equal(own.network.network.pos_embed, trained.pos_embed)
    with pytest.raises(ValueError, match='--model levit_128s does not take images of 300x300; pass --img-size 224'):
        open_models(EvalConfig(img_size=300, model=['levit_128s'], pretrained=False), CPU)


def test_last_and_best_epoch_are_both_named(run, networks, checkpoint, tmp_path):
    file = checkpoint(tmp_path / 'one' / 'last.pth.tar')
    checkpoint(tmp_path / 'one' / 'model_best.pth.tar', epoch=1, state_dict=networks[1].state_dict())
    rows = run('accuracy', model=[str(file.parent)])['rows']
    assert [(row['model'], row['epoch_is'], row['epoch']) for row in rows] == [('last', 'last', 2), ('best', 'best', 1)]
    assert rows[0]['loss'] != rows[1]['loss']


@pytest.mark.parametrize('names, labels', [
    (['runs/photos-none-0/last.pth.tar', 'runs/photos-mixup-0/last.pth.tar'], ['none', 'mixup']),
    (['runs/a/last.pth.tar', 'runs/a/model_best.pth.tar'], ['last', 'best']),
    (['resnet50.a1_in1k', 'resnet50.a2_in1k'], ['a1', 'a2']),
    (['resnet18', 'resnet50'], ['resnet18', 'resnet50']),
    (['runs/photos-none-0/last.pth.tar'], ['photos-none-0']),
    (['x/net', 'x/net'], ['x/net 1', 'x/net 2']),
    (['x/net', 'x/net-b'], ['x/net', 'x/net-b']),
])
def test_short_labels(names, labels):
    assert short_labels(names) == labels


@pytest.mark.parametrize('options, message', [
    (dict(model=None), '--model is missing'),
    (dict(model=['resnet1O']), 'no timm model; did you mean resnet'),
    (dict(model=['.']), 'neither exported weights'),
    (dict(model=['test_resnet'], checkpoint=['gone.pth']), 'gone.pth: no such file'),
    (dict(model=['test_resnet'] * 2, checkpoint=['a', 'b', 'c']), '2 models and 3 checkpoints'),
    (dict(labels=['one']), '--labels needs 2 different names'),
    (dict(data_dir='/nowhere'), '/nowhere does not exist'),
    (dict(split='holdout'), "no folder for the split 'holdout'"),
    (dict(model=['test_resnet'], pretrained=False, img_size=32),
     'has 3 classes, the model has 1000; evaluate on the data it was trained for, or pass --class-map'),
])
def test_what_does_not_fit(run, options, message):
    with pytest.raises(ValueError, match=message):
        run('accuracy', **options)


def test_weights_that_do_not_fit(run, networks, tmp_path):
    torch.save(networks[0].state_dict(), tmp_path / 'plain.pth')
    with pytest.raises(ValueError, match=r'with 1000 classes \(--num-classes .* fc.weight is \(3'):
        run('accuracy', model=['test_resnet'], checkpoint=[str(tmp_path / 'plain.pth')])


def test_weights_that_are_not_finite(run, checkpoint, networks, tmp_path):
    broken = {key: value.clone() for key, value in networks[0].state_dict().items()}
    broken['fc.weight'].fill_(float('nan'))
    file = checkpoint(tmp_path / 'broken' / 'last.pth.tar', state_dict=broken)
    for protocol in ('accuracy', 'robustness', 'calibration', 'ood'):
        with pytest.raises(ValueError, match='broken: the output for 4 of 4 images is not finite'):
            run(protocol, model=[str(file)])


def test_other_classes_than_the_models(run, folder, logits, tmp_path):
    """Classes of another name are refused; some of the classes keep the labels of the model."""
    shutil.copytree(folder, tmp_path / 'renamed')
    (tmp_path / 'renamed' / 'validation' / 'cross').rename(tmp_path / 'renamed' / 'validation' / 'square')
    with pytest.raises(ValueError, match='classes that the training set lacks: square'):
        run('accuracy', data_dir=str(tmp_path / 'renamed'))
    shutil.copytree(folder / 'validation' / 'stripe', tmp_path / 'part' / 'validation' / 'stripe')
    for row, own in zip(run('accuracy', data_dir=str(tmp_path / 'part'))['rows'], logits, strict=True):
        assert row['images'] == 5
        expected = torch.nn.functional.cross_entropy(own[10:], torch.full((5,), 2)).item()
        assert row['loss'] == pytest.approx(expected, rel=1e-4)


def test_files(run, models, tmp_path):
    """All four kinds, whole; kept for the same question, made anew for another one."""
    first = run('accuracy')
    out = tmp_path / 'out'
    assert sorted(path.name for path in out.iterdir()) == [
        'accuracy-classes.csv', 'accuracy-confusion.png', 'accuracy.csv', 'accuracy.json', 'accuracy.md',
        'accuracy.png']
    with open(out / 'accuracy.csv', newline='') as file:
        assert [float(row['top1']) for row in csv.DictReader(file)] == [row['top1'] for row in first['rows']]
    with Image.open(out / 'accuracy.png') as picture:
        assert picture.width > 500
    page = (out / 'accuracy.md').read_text()
    assert '| model | top-1 (%) |' in page and '![accuracy.png](accuracy.png)' in page and first['command'] in page
    assert [entry['fingerprint'] for entry in first['models']] != []

    def again(**options):
        (out / 'accuracy.csv').unlink(missing_ok=True)
        run('accuracy', **options)
        return (out / 'accuracy.csv').exists()
    assert not again(batch_size=7)
    assert again(redo=True) and again(model=models[:1])
    (out / 'accuracy.json').write_text('{"cut')
    assert again()


def test_a_timed_result_is_of_its_machine_and_layout(run, tmp_path):
    options = dict(cost_mixes=['mixup'], cost_batch=2, cost_rounds=1)

    def again(**more):
        before = run('cost', **options, **more)['rows']
        return run('cost', **options, **more)['rows'] == before
    assert again() and again(channels_last=True)
    assert run('cost', **options)['rows'] != run('cost', channels_last=True, **options)['rows']


def test_the_command_gives_the_same_options():
    config_class = options_class('robustness')
    config = config_class(
        model=['a', 'b c'], pgd_curve=[4, 2.5], model_kwargs={'drop': 0.1}, pretrained=False, ema=True)
    words = shlex.split(command_line('robustness', config))
    assert words[:3] == ['python', 'evaluate.py', 'robustness']
    parser = create_parser(config_class, '', '')
    parsed = parse_flags(parser, config_class, lambda flags, file: resolve('robustness', flags, file), words[3:])
    assert parsed.to_dict() == config.to_dict()


def test_a_new_protocol(run, monkeypatch):
    """As the frame's description tells: options, per-image values, table, and a place in `all`."""
    monkeypatch.setattr(base, '_protocols', {name: base._protocols[name] for name in ('accuracy',)})

    @dataclass
    class BrightnessOptions(Options):
        brightness_scale: float = config_option('Brightness', 2.0, 'factor', float, low=0)

    @register_protocol('brightness', BrightnessOptions)
    def brightness(ev):
        """Mean pixel."""
        loader = ev.loader(ev.models[0])
        found = ev.measure('brightness', loader, len(loader), lambda batch: {
            'mean': ev.config.brightness_scale * batch.images.mean((1, 2, 3))})
        assert found['index'].tolist() == list(range(15))
        return Result({'mean': Column('mean', '.3f')}, [{'model': 'all', 'mean': found['mean'].mean()}])

    @register_protocol('boxes')
    def boxes(ev):
        """Needs boxes."""
        raise NotApplicable('the folder has no boxes')

    with pytest.raises(ValueError, match='taken already: option brightness_scale of brightness'):
        register_protocol('other', BrightnessOptions)
    with pytest.raises(ValueError, match='taken already: name boxes'):
        register_protocol('boxes')
    with pytest.raises(ValueError, match=r"unknown protocol 'brightnes'; did you mean brightness\?"):
        options_class('brightnes')
    config = options_class('all')
    assert config(brightness_scale=1).brightness_scale == 1.0
    seen = []
    monkeypatch.setattr('alignmix_lab.evaluation.runner.find_result', lambda *args: seen.append(args[1]))
    with pytest.raises(FileNotFoundError):  # `all` has no file of its own
        run('all', brightness_scale=1)
    assert seen == ['accuracy', 'brightness', 'boxes']
    found = run('brightness')
    assert found['rows'][0]['mean'] == pytest.approx(1.0, abs=0.1) and found['options'] == {'brightness_scale': 2.0}


def test_ffcv_gives_the_same_figures(run, folder, tmp_path):
    """Raw pixels of a .beton file and the images themselves, neither resized."""
    pytest.importorskip('ffcv', reason='FFCV is not installed')
    from alignmix_lab.data import WriteSettings, open_source, write_beton
    write_beton(open_source(str(folder), split='validation'), tmp_path / 'val.beton',
                WriteSettings(write_mode='raw'), workers=0, progress=False)
    found = run('accuracy', data_dir=str(tmp_path), loader='auto', workers=1, output=str(tmp_path / 'ffcv'))
    assert found['data'].startswith('FFCV') and found['rows'] == run('accuracy')['rows']
    with pytest.raises(ValueError, match='has no train.beton'):
        run('accuracy', data_dir=str(tmp_path), loader='ffcv', split='train')


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location('evaluate', ROOT / 'evaluate.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_line(script, models, folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(['--help'])
    assert ended.value.code == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ('accuracy', 'robustness', 'calibration', 'ood', 'all'))
    with pytest.raises(SystemExit, match="unknown protocol 'robustnes'; did you mean robustness"):
        script.main(['robustnes'])
    with pytest.raises(SystemExit):
        script.main(['calibration', '--help'])
    assert '--bins' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script.main(['calibration', '--bin', '3'])
    assert 'did you mean --bins' in capsys.readouterr().err
    words = ['--data-dir', str(folder), '--workers', '0', '--device', 'cpu', '--output', str(tmp_path)]
    with pytest.raises(SystemExit, match='evaluate.py: error: --model gone'):
        script.main(['accuracy', '--model', 'gone', *words])
    (tmp_path / 'eval.yaml').write_text(f'model: [{models[0]}]\nbins: 5\n')
    script.main(['calibration', '--config', str(tmp_path / 'eval.yaml'), '--bins', '6', *words])
    assert '| model | ECE (%) |' in capsys.readouterr().out
    assert json.loads((tmp_path / 'calibration.json').read_text())['options'] == {'bins': 6}


def test_two_processes_equal_one(launch, run, models, folder, tmp_path):
    """Each image once, by whichever process; sets that are smaller than a batch, and one image for two processes."""
    rng = np.random.default_rng(1)
    np.savez(tmp_path / 'few.npz', x=rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8))
    options = dict(model=models, data_dir=str(folder), loader='timm', workers=0, batch_size=4, device='cpu')
    jobs = {
        'accuracy': {},
        'robustness': dict(pgd_iterations=1, pgd_curve=[4]),
        'ood': dict(ood=[str(tmp_path / 'few.npz')], ood_noise=['uniform-added', 'gaussian']),
    }
    code = (
        'import json, sys, torch\n'
        'from alignmix_lab.evaluation import evaluate, options_class\n'
        'torch.set_num_threads(1)\n'
        'for name, options in json.loads(sys.argv[1]).items():\n'
        '    evaluate(name, options_class(name)(**options))\n'
        'torch.distributed.destroy_process_group()\n')
    (tmp_path / 'two.py').write_text(code)
    todo = {name: {**options, **own, 'output': str(tmp_path / 'two')} for name, own in jobs.items()}
    launch(
        '--multi_gpu', '--num_processes', '2', '--main_process_port', '0', str(tmp_path / 'two.py'), json.dumps(todo),
        ACCELERATE_USE_CPU='1')
    for name, own in jobs.items():
        one, two = run(name, **own), json.loads((tmp_path / 'two' / f'{name}.json').read_text())
        assert (one['environment']['processes'], two['environment']['processes']) == (1, 2)
        for left, right in zip(one['rows'], two['rows'], strict=True):
            for key in left:
                is_number = isinstance(left[key], (int, float))
                assert (pytest.approx(left[key], rel=1e-5) if is_number else left[key]) == right[key], (name, key)


def test_random_weights_are_never_taken_for_trained_ones():
    with pytest.raises(ValueError, match='timm has no weights for it; pass --checkpoint FILE'):
        open_models(EvalConfig(model=['preactresnet18']), CPU)


def test_all_options_have_names_of_their_own():
    assert options_class('all')().bins == 15
    assert evaluate.__module__ == 'alignmix_lab.evaluation.runner'


def test_all_records_the_command_of_each_protocol(models, folder):
    """A command with the options of the other protocols would be refused when it is run."""
    config = options_class('all')(model=models, data_dir=str(folder), bins=7, pgd_iterations=3, skip=['cost'])
    for name, own in (('accuracy', set()), ('calibration', {'--bins'}), ('robustness', {'--pgd-iterations'})):
        words = shlex.split(command_line(name, config))
        config_class = options_class(name)
        parser = create_parser(config_class, '', '')
        parse_flags(parser, config_class, lambda flags, file, name=name: resolve(name, flags, file), words[3:])
        assert {'--bins', '--pgd-iterations', '--skip'} & set(words) == own


def test_all_skips_what_is_named(models, folder, tmp_path, caplog):
    others = [name for name in base.list_protocols() if name != 'accuracy']
    options = dict(model=models, data_dir=str(folder), workers=0, device='cpu', output=str(tmp_path))
    assert list(evaluate('all', options_class('all')(**options, skip=others))) == ['accuracy']
    with pytest.raises(ValueError, match="unknown protocol 'costs'; did you mean cost"):
        evaluate('all', options_class('all')(**options, skip=['costs']))
