"""Whole runs on coloured rectangles: training, resuming, averaging, exporting, predicting, several processes."""
import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from alignmix_lab.commands import detect as detect_command
from alignmix_lab.runs.options import option_words
from detection import validate
from detection.annotations import read_voc
from detection.config import DetectConfig, resolve_config
from detection.detector import create_detector
from detection.export_checkpoint import export_detector, load_detector
from detection.predict import predict
from detection.task import DetectionTask
from detection.train import main, parse_config, train
from detection.validate import collect

from .conftest import add_coco

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(
    detector='ssd', backbone='test_resnet', img_size=96, batch_size=4, workers=0, device='cpu', pictures=2,
    opt='adamw', lr=2e-3, sched='constant', warmup_epochs=0, augment='hflip', freeze_bn=True, curves=False)


def run(data, output, name, **options):
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
    return train(resolve_config(
        {**TINY, 'data_dir': str(data), 'output': str(output), 'experiment': name, **options}))


@pytest.fixture(scope='module')
def whole(rectangles, tmp_path_factory):
    """A run of two epochs with a moving average."""
    return run(rectangles, tmp_path_factory.mktemp('runs'), 'whole', epochs=2, model_ema=True, model_ema_decay=0.5)


def weights(folder, key='state_dict'):
    return torch.load(folder / 'last.pth.tar', weights_only=True)[key]


def test_a_run_leaves_its_files(whole):
    folder = whole['folder']
    with open(folder / 'summary.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert list(rows[0])[:4] == ['epoch', 'train_loss', 'eval_voc07_11pt', 'eval_voc_area']
    assert float(rows[1]['train_loss']) < float(rows[0]['train_loss'])
    assert float(rows[1]['eval_map']) == whole['last']['map']
    for name in ('test', 'test-ema'):
        classes = json.loads((folder / f'classes-{name}.json').read_text())
        assert set(classes) == {'red', 'blue'} and set(classes['red']) == {'voc07_11pt', 'voc_area', 'map', 'map50'}
        assert len(list((folder / f'pictures-{name}').glob('*.png'))) == 2
    picture = np.asarray(Image.open(folder / 'pictures-test' / 'test0.png'))
    assert (picture == 255).all(-1).any()  # the true box


@pytest.mark.parametrize('within', [False, True])
def test_a_resumed_run_equals_one_that_never_stopped(whole, rectangles, tmp_path, monkeypatch, within):
    """Stopped between the two epochs, or by an error in the second of the three updates of the second one."""
    ema = dict(epochs=2, model_ema=True, model_ema_decay=0.5)
    if within:
        forward, calls = DetectionTask.forward, itertools.count()

        def failing(task, *batch):
            if next(calls) == 4:
                raise MemoryError
            return forward(task, *batch)
        with monkeypatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr(DetectionTask, 'forward', failing)
            run(rectangles, tmp_path, 'parts', checkpoint_steps=1, **ema)
        assert (tmp_path / 'parts' / 'recovery-1-1.pth.tar').exists()
    else:
        run(rectangles, tmp_path, 'parts', stop_epoch=1, **ema)
    resumed = run(rectangles, tmp_path, 'parts', resume='auto', **ema)
    for key in ('state_dict', 'state_dict_ema'):
        expected, found = weights(whole['folder'], key), weights(resumed['folder'], key)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert resumed['last'] == whole['last']
    with pytest.raises(ValueError, match='trained on the classes blue, red, the data have red, blue'):
        run(rectangles, tmp_path, 'parts', resume='auto', epochs=3, class_names=['red', 'blue'])


def test_export_and_prediction_give_the_trained_detector(whole, rectangles, tmp_path):
    folder = export_detector(whole['folder'] / 'last.pth.tar', tmp_path / 'exported', ema=False)
    assert sorted(path.name for path in folder.iterdir()) == ['detector.json', 'model.safetensors']
    detector, names = load_detector(folder)
    assert names == ['blue', 'red'] and not detector.training
    assert all(torch.equal(value, weights(whole['folder'])[key]) for key, value in detector.state_dict().items())
    averaged, _ = load_detector(whole['folder'] / 'last.pth.tar')
    ema = weights(whole['folder'], 'state_dict_ema')
    assert all(torch.equal(value, ema[key]) for key, value in averaged.state_dict().items())

    image = rectangles / 'JPEGImages' / 'test0.png'
    out = predict([str(image)], str(folder), str(tmp_path / 'out'), threshold=0.05, device='cpu')
    (result,) = json.loads((out / 'predictions.json').read_text())
    with torch.no_grad():
        pixels = torch.from_numpy(np.asarray(Image.open(image)).copy()).permute(2, 0, 1) / 255
        (expected,) = detector([pixels])
    assert len(result['boxes']) > 0
    assert result['scores'] == pytest.approx(expected['scores'][:len(result['scores'])].tolist(), abs=1e-4)
    assert Image.open(out / 'test0.png').size == (64, 48)
    with pytest.raises(ValueError, match='absent.png: no such image'):
        predict(['absent.png'], str(folder), str(tmp_path / 'out'))


def test_validation_equals_that_of_the_run(whole, rectangles, tmp_path, capsys):
    words = ['--data-dir', str(rectangles), '--device', 'cpu', '--pictures', '1', '--output', str(tmp_path)]
    detect_command.main(['validate', '--checkpoint', str(whole['folder'] / 'last.pth.tar'), *words])
    classes = json.loads((tmp_path / 'classes.json').read_text())
    assert classes == json.loads((whole['folder'] / 'classes-test-ema.json').read_text())
    assert [path.name for path in (tmp_path / 'pictures').iterdir()] == ['test0.png']
    results = json.loads((tmp_path / 'results.json').read_text())
    assert {result['image_id'] for result in results} <= {f'test{index}' for index in range(5)}
    with pytest.raises(SystemExit, match='^python -m detection.validate: error: .*none: no such folder'):
        validate.main(['--checkpoint', str(whole['folder'] / 'last.pth.tar'), '--data-dir', str(tmp_path / 'none')])


def test_results_have_cocos_own_ids(whole, rectangles, tmp_path):
    """As pycocotools reads them beside the annotation file, whose ids are not those of the detector."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    categories = [dict(id=7, name='red'), dict(id=3, name='blue'), dict(id=9, name='green')]
    records = read_voc(rectangles, 'test', ['red', 'blue']).records
    annotations = [
        dict(image_id=40 - index, category_id=(7, 3)[label - 1], bbox=[*box[:2], *(box[2:] - box[:2])])
        for index, record in enumerate(records) for box, label in zip(record.boxes, record.labels, strict=True)]
    images = [dict(id=40 - index, width=64, height=48) for index in range(len(records))]
    add_coco(tmp_path, 'val', images, annotations, categories)
    for image, record in zip(images, records, strict=True):
        shutil.copy(record.path, tmp_path / 'val' / image['file_name'])
    metrics = validate.evaluate(
        str(whole['folder'] / 'last.pth.tar'), str(tmp_path / 'out'), data_dir=str(tmp_path), dataset='coco',
        val_split='val', device='cpu', workers=0)
    truth = COCO(str(tmp_path / 'annotations' / 'instances_val.json'))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / 'out' / 'results.json')), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert metrics['map'] == pytest.approx(100 * evaluation.stats[0]) == pytest.approx(whole['last']['map'])


def test_other_files_are_no_detectors(whole, tmp_path):
    with pytest.raises(ValueError, match='no exported detector'):
        load_detector(tmp_path)
    state = torch.load(whole['folder'] / 'last.pth.tar', weights_only=True)
    torch.save({**state, 'task_state': {}}, tmp_path / 'other.pth.tar')
    with pytest.raises(ValueError, match='no checkpoint of a detector'):
        load_detector(tmp_path / 'other.pth.tar')
    key = next(iter(state['state_dict']))
    del state['state_dict'][key]
    torch.save(state, tmp_path / 'partial.pth.tar')
    with pytest.raises(ValueError, match=f'missing.*{key}'):
        load_detector(tmp_path / 'partial.pth.tar', ema=False)
    del state['state_dict_ema']
    torch.save(state, tmp_path / 'raw.pth.tar')
    with pytest.raises(ValueError, match='no moving average'):
        load_detector(tmp_path / 'raw.pth.tar', ema=True)


def test_faster_rcnn_trains_from_given_weights(rectangles, tmp_path):
    """From a folder of weights; its norms and first stage stay as they were, the rest trains, COCO's split of labels
    included. The checkpoint loads without that folder."""
    torch.manual_seed(1)
    source = timm.create_model('test_resnet', num_classes=3)
    timm.models.save_for_hf(source, tmp_path / 'w', dict(architecture='test_resnet'))
    result = run(
        rectangles, tmp_path, 'faster', detector='fasterrcnn', img_size=64, weights=str(tmp_path / 'w'), epochs=1,
        augment='multiscale', model_kwargs=dict(fpn_channels=16, box_batch_size_per_image=16,
                                                rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=20))
    (tmp_path / 'w').rename(tmp_path / 'gone')
    detector, _ = load_detector(result['folder'] / 'last.pth.tar')
    assert detector.transform.min_size[-1] == 64 and len(detector.transform.min_size) == 11
    body, before = detector.backbone.body.state_dict(), source.state_dict()
    same = {name: torch.equal(value, before[name]) for name, value in body.items() if name in before}
    assert same['conv1.weight' if 'conv1.weight' in same else next(iter(same))]
    assert all(equal for name, equal in same.items() if 'running' in name)
    assert not all(same.values())


@pytest.mark.parametrize('detector', ['ssd', 'fasterrcnn'])
def test_mixed_precision_trains_as_float32_does(detector, rectangles, tmp_path):
    """The loss of an epoch agrees to bfloat16's precision, and weights stay in float32."""
    options = dict(detector=detector, epochs=1, lr=1e-3, pictures=0)
    if detector == 'fasterrcnn':
        options.update(img_size=64, model_kwargs=dict(fpn_channels=16, rpn_post_nms_top_n_train=50))
    losses = []
    for name, amp in (('fp32', {}), ('bf16', dict(amp=True, amp_dtype='bfloat16'))):
        result = run(rectangles, tmp_path, name, **options, **amp)
        losses.append(result['history'][0]['train']['loss'])
        assert all(value.dtype != torch.bfloat16 for value in weights(result['folder']).values())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_one_image_cannot_train_norms_of_one_position(rectangles, tmp_path):
    with pytest.raises(ValueError, match='conv4_stride1 .* --batch-size 2 or more'):
        run(rectangles, tmp_path, 'one', batch_size=1, model_kwargs=dict(conv4_stride1=True))


@pytest.mark.parametrize('detector, kwargs, message', [
    ('ssd', dict(backbone_kwargs=dict(depths=3)), "^--backbone-kwargs depths=3 cannot work .*argument 'depths'"),
    ('ssd', dict(backbone_kwargs=dict(drop_path_rate='x')), '^--backbone-kwargs drop_path_rate=x cannot work'),
    # Torchvision takes any name, and looks at values when it first needs them.
    ('ssd', dict(model_kwargs=dict(score_tresh=0.5)), '^--model-kwargs score_tresh=0.5: .* score_thresh, nms_thresh'),
    ('fasterrcnn', dict(model_kwargs=dict(score_thresh=0.5)), 'fasterrcnn has no such option.* box_score_thresh,'),
    ('fasterrcnn', dict(model_kwargs=dict(min_size=32)), 'or a flag of its own sets it'),
    ('ssd', dict(model_kwargs=dict(frozen_stages=1), frozen_stages=1), 'or a flag of its own sets it'),
    ('ssd', dict(model_kwargs=dict(nms_thresh='x')), '^--model-kwargs nms_thresh=x is no float; the default is 0.45'),
    ('fasterrcnn', dict(model_kwargs=dict(fpn_channels=1.5)), 'fpn_channels=1.5 is no int'),
    ('fasterrcnn', dict(model_kwargs=dict(fixed_size=3)), '^--model-kwargs fixed_size=3 cannot work'),
])
def test_arguments_that_do_not_exist_or_have_another_type(detector, kwargs, message):
    config = DetectConfig(detector=detector, backbone='test_resnet', data_dir='.', img_size=128, **kwargs)
    with pytest.raises(ValueError, match=message):
        create_detector(config, ['a'])


def test_arguments_of_the_detector_reach_it():
    options = dict(score_thresh=1, detections_per_img=7, conv4_stride1=False)
    detector, _ = create_detector(DetectConfig(
        detector='ssd', backbone='test_resnet', data_dir='.', img_size=128, model_kwargs=options), ['a'])
    assert (detector.score_thresh, detector.detections_per_img) == (1, 7)


def test_the_script_ends_with_the_name_of_an_unreadable_image(rectangles, tmp_path):
    data = shutil.copytree(rectangles, tmp_path / 'data')
    (data / 'JPEGImages' / 'trainval3.png').write_bytes(b'no image')
    words = [word for name, value in TINY.items() for word in option_words(name, value)]
    with pytest.raises(SystemExit, match=r'^detection.train: error: /.*trainval3.png is damaged or no image \('):
        main([*words, '--data-dir', str(data), '--output', str(tmp_path), '--epochs', '1'])


def test_images_must_all_be_evaluated():
    assert collect({1: 'b', 0: 'a'}, 2) == ['a', 'b']
    with pytest.raises(RuntimeError, match='1 of 3 validation images'):
        collect({0: 'a', 2: 'c'}, 3)


def test_flags_yaml_and_defaults(tmp_path, capsys):
    (tmp_path / 'r.yaml').write_text('detector: ssd\nlr: 1e-3\nepochs: 7\n')
    config = parse_config(['-c', str(tmp_path / 'r.yaml'), '--data-dir', 'D', '--epochs', '9'])
    assert (config.detector, config.lr, config.epochs, config.img_size, config.augment) == ('ssd', 1e-3, 9, 300, 'ssd')
    assert config.eval_metric == 'voc07_11pt' and config.max_size is None
    config = parse_config(['--data-dir', 'D', '--dataset', 'coco'])
    assert (config.img_size, config.max_size, config.augment, config.eval_metric) == (800, 1333, 'hflip', 'map')
    for flags, message in [
        ([], '--data-dir is missing'),
        (['--data-dir', 'D', '--detector', 'yolo'], 'invalid choice'),
        (['--data-dir', 'D', '--backbon', 'x'], 'did you mean --backbone'),
        (['--data-dir', 'D', '--augment', 'ssd'], '--augment ssd goes with --detector ssd'),
        (['--data-dir', 'D', '--detector', 'ssd', '--max-size', '900'], '--max-size is for fasterrcnn'),
        (['--data-dir', 'D', '--layer-decay-min-scale', '0.1'], 'has no effect on detectors'),
    ]:
        with pytest.raises(SystemExit):
            parse_config(flags)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_config(['--help'])
    text = capsys.readouterr().out
    assert 'accelerate launch -m detection.train' in text and '--weights' in text and '--resume' in text


def test_recipes_are_valid():
    recipes = sorted((ROOT / 'recipes' / 'detection').glob('*.yaml'))
    assert len(recipes) >= 4
    for path in recipes:
        assert isinstance(resolve_config({'data_dir': 'D'}, str(path)), DetectConfig)
        assert path.read_text().startswith('# ')


def test_two_processes_evaluate_each_image_once(whole, rectangles, tmp_path):
    """The same weights measured by one and by two processes: the same figures; five images do not split evenly."""
    flags = [
        '--data-dir', str(rectangles), '--detector', 'ssd', '--backbone', 'test_resnet', '--img-size', '96', '-b', '2',
        '-j', '0', '--device', 'cpu', '--epochs', '1', '--lr', '0', '--freeze-bn', '--opt', 'sgd', '--output',
        str(tmp_path), '--warmup-epochs', '0', '--pictures', '0', '--initial-checkpoint',
        str(whole['folder'] / 'last.pth.tar')]
    env = {**os.environ, 'ACCELERATE_USE_CPU': '1', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    two = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', '29617']
    subprocess.run([*two, '-m', 'detection.train', *flags, '--experiment', 'two'], check=True, env=env, cwd=tmp_path,
                   capture_output=True)
    config = parse_config([*flags, '--experiment', 'one'])
    train(config)
    rows = []
    for name in ('one', 'two'):
        with open(tmp_path / name / 'summary.csv', newline='') as file:
            rows += csv.DictReader(file)
    for key in ('eval_voc_area', 'eval_map', 'eval_map50'):
        assert float(rows[0][key]) == pytest.approx(float(rows[1][key]), abs=1e-6)
        assert float(rows[0][key]) > 0
