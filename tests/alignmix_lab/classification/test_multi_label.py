"""A run on images with any number of labels: its metrics, ranking and export, alone and on two processes."""
import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score

from alignmix_lab.classification import TrainConfig
from alignmix_lab.classification.build import create_task, model_arguments

SHAPES = ('bar', 'dot', 'frame')


def draw(rows):
    """Noisy images of three shapes, each there or not."""
    rng = np.random.default_rng(len(rows))
    for row in rows:
        image = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        for shape, place in zip(row, (np.s_[:, 4:12], np.s_[20:36, 24:40], np.s_[52:60, 16:64]), strict=True):
            image[place] += np.uint8(150 * shape)
        yield Image.fromarray(image)


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    """Images, train.csv and validation.csv; the rows of the latter."""
    root = tmp_path_factory.mktemp('shapes')
    (root / 'images').mkdir()
    for split, count in (('train', 64), ('validation', 27)):
        rows = (np.random.default_rng(count).random((count, 3)) < 0.4).astype(int)
        with open(root / f'{split}.csv', 'w', newline='') as file:
            writer = csv.writer(file)
            writer.writerow(['file', 'labels'])
            for index, (row, image) in enumerate(zip(rows, draw(rows), strict=True)):
                image.save(root / 'images' / f'{split}{index:02d}.png')
                writer.writerow([f'{split}{index:02d}.png', ' '.join(np.array(SHAPES)[row == 1])])
    return root, rows


@pytest.mark.parametrize('mix, options', [('none', {}), ('densemultimix', dict(n=12)), ('cutmix', {})])
def test_a_run_learns_several_labels(shapes, make_config, run_training, tmp_path, mix, options):
    root, rows = shapes
    run = run_training(make_config(
        tmp_path, data_dir=str(root), multi_label=True, mix=mix, mix_kwargs=options, epochs=8, export='auto', seed=1))
    with open(run.folder / 'summary.csv', newline='') as file:
        summary = list(csv.DictReader(file))
    maps = [float(row['eval_map']) for row in summary]
    assert maps[-1] > 90 > maps[0] and maps[-1] > 100 * rows.mean() + 30
    assert run.result['best']['map'] == max(maps)  # ranked by it
    assert 'eval_macro_f1' in summary[0] and 'eval_top1' not in summary[0]
    assert any('mAP: ' in line for line in run.log) and any(', accuracy ' in line for line in run.log)

    model = timm.create_model(f'local-dir:{run.folder / "export"}', pretrained=True).eval()
    images = np.stack([np.asarray(Image.open(root / 'images' / f'validation{index:02d}.png')) for index in range(27)])
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        logits = model((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std)
    found = run.result['last']
    assert found['map'] == pytest.approx(100 * average_precision_score(rows, logits, average='macro'), abs=0.1)
    f1 = f1_score(rows, logits > 0, average='macro', zero_division=0)
    assert found['macro_f1'] == pytest.approx(100 * f1, abs=0.1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(rows).float())
    assert found['loss'] == pytest.approx(loss.item(), rel=1e-4)

    exported = json.loads((run.folder / 'export' / 'config.json').read_text())
    assert exported['label_names'] == list(SHAPES) and exported['training']['multi_label'] is True
    card = (run.folder / 'export' / 'README.md').read_text()
    assert 'any number for an image: apply a sigmoid' in card and '| mAP (%) | macro F1 (%) |' in card
    assert f'value: {round(found["map"], 2)}' in card and 'top-1' not in card


def test_options_of_several_labels(shapes):
    config = TrainConfig(data_dir=str(shapes[0]), multi_label=True)
    assert config.bce_loss and config.eval_metric == 'map' and config.loader == 'timm'
    assert TrainConfig().eval_metric == 'top1' and not TrainConfig().bce_loss
    with pytest.raises(ValueError, match='--eval-metric map: without --multi-label the metrics are loss, top1, top5'):
        TrainConfig(eval_metric='map')
    with pytest.raises(ValueError, match='--eval-metric top1: with --multi-label the metrics are loss, map, '):
        TrainConfig(data_dir=str(shapes[0]), multi_label=True, eval_metric='top1')


def test_smoothing_moves_labels_towards_one_half(shapes, make_config, tmp_path):
    """As timm's MultiLabelClassificationTask smooths, not towards the number of classes."""
    config = make_config(tmp_path, data_dir=str(shapes[0]), multi_label=True, smoothing=0.2)
    images = dict(input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.25,) * 3)
    task = create_task(config, model_arguments(config), images, 3, torch.device('cpu'))
    target = torch.tensor([[1., 0, 0], [1, 1, 0]])
    result = task(torch.randn(2, 3, 64, 64), target)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(result['output'], target * 0.8 + 0.1)
    torch.testing.assert_close(result['loss'], expected)
