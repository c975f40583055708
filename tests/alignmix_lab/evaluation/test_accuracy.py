"""Figures by class against torchmetrics, scikit-learn and loops; confusion matrices; images with several labels."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score
from timm.task import MultiLabelClassificationEvaluator
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    multiclass_precision,
    multiclass_recall,
    multilabel_average_precision,
)

from alignmix_lab.evaluation import NotApplicable
from alignmix_lab.evaluation.protocols.per_class import average_precision, class_scores, draw_confusion, most_confused
from alignmix_lab.runs.plotting import as_png

CLASSES = ['blob', 'cross', 'stripe']


def guesses(count=400, classes=12):
    """Labels and predictions; class 3 has no images, 5 is never predicted, and 7 is neither."""
    rng = np.random.default_rng(0)
    label = rng.choice([c for c in range(classes) if c not in (3, 7)], count)
    wrong = rng.choice([c for c in range(classes) if c not in (5, 7)], count)
    return label, np.where((rng.random(count) < 0.5) & (label != 5), label, wrong)


def test_class_scores_are_torchmetrics_and_a_loops():
    label, prediction = guesses()
    found = class_scores(label, prediction, 12)
    tensors = torch.from_numpy(prediction), torch.from_numpy(label)
    for key, metric in (('recall', multiclass_recall), ('precision', multiclass_precision)):
        expected = metric(*tensors, num_classes=12, average='none').numpy()  # 0 where there is nothing to divide by
        np.testing.assert_allclose(np.nan_to_num(found[key]), 100 * expected, rtol=1e-6)
    for c in range(12):
        hits = sum(a == b == c for a, b in zip(label, prediction, strict=True))
        images, predicted = (label == c).sum(), (prediction == c).sum()
        assert found['images'][c] == images
        for key, of in (('recall', images), ('precision', predicted)):
            assert found[key][c] == pytest.approx(100 * hits / of) if of else np.isnan(found[key][c])
        f1 = 100 * 2 * hits / (images + predicted) if images + predicted else np.nan
        assert found['f1'][c] == pytest.approx(f1, nan_ok=True)
    assert np.isnan(found['recall'][[3, 7]]).all() and np.isnan(found['precision'][[5, 7]]).all()


def test_the_most_confused_pairs_come_first():
    label, prediction = guesses()
    names = [f'class {c}' for c in range(12)]
    counts = {}
    for a, b in zip(label.tolist(), prediction.tolist(), strict=True):
        if a != b:
            counts[a, b] = counts.get((a, b), 0) + 1
    expected = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:9]
    assert most_confused(label, prediction, names, 9) == [
        {'class': names[a], 'predicted': names[b], 'images': n, 'of': int((label == a).sum())}
        for (a, b), n in expected]
    assert most_confused(label, label, names) == []


@pytest.mark.parametrize('classes', [10, 1000])
def test_a_confusion_matrix_is_dark_where_images_are(classes):
    label = np.repeat(np.arange(classes), 3)
    prediction = np.where(label < classes // 2, label, classes - 1)  # the second half is taken for the last class
    fig = draw_confusion({'net': (label, prediction)}, [f'class {c}' for c in range(classes)])
    axes = fig.axes[0]
    shares = np.asarray(axes.images[0].get_array())
    assert shares.shape == (classes, classes) and (shares.sum(axis=1) == 100).all()
    assert (shares[classes // 2:, -1] == 100).all() and shares[0, 0] == 100
    labels = [text.get_text() for text in axes.get_xticklabels()]
    numbers = [text.get_text() for text in axes.texts]
    if classes == 10:
        assert labels == [f'class {c}' for c in range(10)]
        assert numbers.count('100') == 10 and numbers.count('') == 90
    else:
        assert labels == [] and numbers == []
    assert as_png(fig).startswith(b'\x89PNG')


def test_the_protocol_writes_a_table_by_class(run, logits, pixels, tmp_path):
    found = run('accuracy')
    label = pixels[1]
    with open(tmp_path / 'out' / 'accuracy-classes.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['model'], row['class']) for row in rows] == [(model, name) for model in 'ab' for name in CLASSES]
    for place, own in enumerate(logits):
        prediction = own.argmax(1).numpy()
        recall = [(prediction[label == c] == c).mean() for c in range(3)]
        assert [float(row['recall']) for row in rows[3 * place:3 * place + 3]] == pytest.approx(
            [100 * value for value in recall])
        assert found['rows'][place]['f1'] == pytest.approx(100 * f1_score(label, prediction, average='macro'))
        pairs = found['details']['most_confused']['ab'[place]]
        assert sum(pair['images'] for pair in pairs) == (prediction != label).sum() > 0
    first = found['details']['most_confused']['a'][0]
    page = (tmp_path / 'out' / 'accuracy.md').read_text()
    assert f'Most confused, a: {first["class"]} as {first["predicted"]} ({first["images"]} of 5)' in page
    assert '![accuracy-confusion.png](accuracy-confusion.png)' in page
    with Image.open(tmp_path / 'out' / 'accuracy-confusion.png') as picture:
        assert picture.width > 500


def test_average_precision_is_torchmetrics_and_timms():
    rng = np.random.default_rng(0)
    label = rng.random((60, 5)) < 0.3
    label[:, 2] = False
    logits = rng.normal(size=(60, 5)).round(1)  # with ties
    expected = multilabel_average_precision(
        torch.from_numpy(logits).sigmoid(), torch.from_numpy(label).int(), num_labels=5, average='none')
    found = average_precision(logits, label)
    assert found == pytest.approx(100 * expected.abs().numpy(), abs=1e-4) and found[2] == 0
    assert (average_precision(1000 * logits, label) == found).all()  # though the probabilities are 0 and 1
    evaluator = MultiLabelClassificationEvaluator()
    evaluator.update(torch.from_numpy(logits), torch.from_numpy(label).float())
    assert evaluator.compute()['map'] == pytest.approx(found.mean())


def test_a_single_label():
    label, prediction = np.array([[1], [1], [0], [0], [0]]), np.array([[1], [0], [0], [0], [1]])
    found = class_scores(label, prediction, 1)
    assert {key: value.tolist() for key, value in found.items()} == {
        'images': [2], 'recall': [50], 'precision': [50], 'f1': [50]}


@pytest.fixture
def labelled(folder, pixels, tmp_path):
    """The images with several labels, and the rows (15, 3)."""
    root = tmp_path / 'labelled'
    shutil.copytree(folder, root)
    rows = np.random.default_rng(1).random((15, 3)) < 0.5
    with open(root / 'validation.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['file', *CLASSES])
        for index, (label, row) in enumerate(zip(pixels[1], rows, strict=True)):
            writer.writerow([f'{CLASSES[label]}/{index:02d}.png', *row.astype(int)])
    return root, rows


def test_images_with_several_labels(run, labelled, logits, tmp_path):
    root, rows = labelled
    found = run('accuracy', data_dir=str(root), multi_label=True)
    with open(tmp_path / 'out' / 'accuracy-classes.csv', newline='') as file:
        table = list(csv.DictReader(file))
    for place, (row, own) in enumerate(zip(found['rows'], logits, strict=True)):
        ap = 100 * multilabel_average_precision(own, torch.from_numpy(rows).int(), num_labels=3, average='none').numpy()
        assert row['map'] == pytest.approx(np.mean(ap), abs=1e-3)
        assert [float(line['ap']) for line in table[3 * place:3 * place + 3]] == pytest.approx(ap, abs=1e-3)
        assert [float(line['images']) for line in table[3 * place:3 * place + 3]] == rows.sum(0).tolist()
        f1 = f1_score(rows, own.sigmoid().numpy() >= 0.5, average='macro', zero_division=0)
        assert row['f1'] == pytest.approx(100 * f1)
        loss = F.binary_cross_entropy_with_logits(own, torch.from_numpy(rows).double())
        assert row['loss'] == pytest.approx(loss.item(), rel=1e-4) and row['images'] == 15
    assert json.loads((tmp_path / 'out' / 'accuracy.json').read_text())['pictures'] == ['accuracy.png']
    with pytest.raises(NotApplicable, match='calibration takes images with one label; leave --multi-label out'):
        run('calibration', data_dir=str(root), multi_label=True)


def test_a_model_of_several_labels_says_so(run, models, tmp_path):
    shutil.copytree(models[0], tmp_path / 'several')
    config = json.loads((tmp_path / 'several' / 'config.json').read_text())
    config['training']['multi_label'] = True
    (tmp_path / 'several' / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='several was trained on images with several labels; pass --multi-label'):
        run('accuracy', model=[str(tmp_path / 'several')])
