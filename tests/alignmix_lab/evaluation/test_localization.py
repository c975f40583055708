"""Maps against the classifier's weights, folders of both formats, class folders for training, and a whole run."""
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from alignmix_lab import evaluation
from alignmix_lab.commands import cub
from alignmix_lab.data import create_loaders
from alignmix_lab.evaluation.base import NotApplicable
from alignmix_lab.evaluation.protocols import localization
from alignmix_lab.evaluation.protocols.box_data import open_boxes
from alignmix_lab.evaluation.protocols.localization import ClassMaps, judge, measures


def test_maps_are_class_weight_times_features():
    model = timm.create_model('resnet18', num_classes=3).eval()
    images = torch.randn(2, 3, 64, 96)
    logits, maps = ClassMaps(model, (64, 96))(images)
    with torch.no_grad():
        features = model.forward_features(images)
        expected = torch.einsum('cd,bdhw->bchw', model.fc.weight, features) + model.fc.bias[:, None, None]
        torch.testing.assert_close(logits, model(images))
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(maps.mean((2, 3)), logits)


@pytest.mark.parametrize('name, kwargs, size, grid', [
    ('resnet18', dict(output_stride=16), (64, 64), (4, 4)),  # the last stage without its stride: twice the positions
    ('vgg16_gap', dict(stages=((4, 1),) * 5, gap_chs=8), (64, 64), (4, 4)),
    ('test_vit', dict(img_size=(64, 96)), (64, 96), (4, 6)),  # a class token: its patch tokens
    ('test_convnext', {}, (64, 96), (2, 3)),  # a norm behind the pooling
])
def test_grid_of_positions(name, kwargs, size, grid):
    _, maps = ClassMaps(timm.create_model(name, num_classes=2, **kwargs).eval(), size)(torch.randn(1, 3, *size))
    assert maps.shape == (1, 2, *grid)


def test_models_without_positions_are_refused():
    with pytest.raises(ValueError, match='vgg11'):
        ClassMaps(timm.create_model('vgg11', num_classes=2, mlp_ratio=1 / 512).eval(), (224, 224))


def test_judge_and_measures_by_hand():
    class_map = np.zeros((8, 8))
    class_map[2:6, 2:6] = 1
    truth = np.array([[2, 2, 6, 6]])
    right = judge(class_map, truth, True, (8, 8), 0.15)
    wrong = judge(class_map, truth, False, (8, 8), 0.15)
    missed = judge(class_map, np.array([[0, 0, 1, 1]]), True, (8, 8), 0.15)
    assert right.fixed_iou == 1 and missed.fixed_iou == 0
    found = {
        name: np.array([getattr(pair, name) for pair in (right, wrong, missed, wrong)])
        for name in ('correct', 'fixed_iou', 'largest', 'every')}
    row = measures(found)
    assert (row['top1'], row['top1_loc'], row['gt_known']) == (50, 25, 75)
    assert (row['maxboxacc'], row['maxboxacc_v2'], row['pairs']) == (75, 75, 4)


@pytest.fixture
def birds(tmp_path):
    """Six images of two classes in the format of CUB-200-2011: a bright square at a known place."""
    root = tmp_path / 'birds'
    rng = np.random.default_rng(0)
    rows = {name: [] for name in ('images', 'image_class_labels', 'train_test_split', 'bounding_boxes')}
    for i in range(6):
        label = i % 2
        path = f'{label + 1:03}.{("Auk", "Wren")[label]}/{i}.png'
        pixels = rng.integers(0, 60, (40, 50, 3), dtype=np.uint8)
        pixels[10:20, 5 + i:25 + i, label] = 250
        (root / 'images' / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / 'images' / path)
        rows['images'].append(f'{i + 1} {path}')
        rows['image_class_labels'].append(f'{i + 1} {label + 1}')
        rows['train_test_split'].append(f'{i + 1} {int(i < 4)}')
        rows['bounding_boxes'].append(f'{i + 1} {5 + i}.0 10.0 20.0 10.0')
    for name, lines in rows.items():
        (root / f'{name}.txt').write_text('\n'.join(lines) + '\n')
    return root


def test_cub_format(birds):
    source = open_boxes(str(birds), 'validation')
    assert [image.path.name for image in source.dataset] == ['4.png', '5.png']
    assert source.class_names == ['001.Auk', '002.Wren']
    assert source.dataset[0].boxes['001.Auk'].tolist() == [[9, 10, 29, 20]]  # x + width is the last column
    assert len(open_boxes(str(birds), 'train').dataset) == 4
    assert localization.whole_image(source) == 0  # 20x10 of 50x40 pixels
    (birds / 'bounding_boxes.txt').write_text('1 0 0 5 5\n')
    with pytest.raises(ValueError, match='other ids than images.txt: 2, 3'):
        open_boxes(str(birds), 'train')
    with pytest.raises(NotApplicable, match='localization needs boxes'):
        open_boxes(str(birds / 'images'), 'validation')
    with pytest.raises(NotApplicable, match='needs boxes'):
        open_boxes(None, 'validation')


def test_voc_format(tmp_path):
    for name in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (tmp_path / name).mkdir(parents=True)
    def item(name, *corners):
        keys = ('xmin', 'ymin', 'xmax', 'ymax')
        box = ''.join(f'<{key}>{value}</{key}>' for key, value in zip(keys, corners, strict=True))
        return f'<object><name>{name}</name><bndbox>{box}</bndbox></object>'
    shown = {'a': item('cat', 1, 2, 10, 12) + item('dog', 3, 3, 5, 5) + item('cat', 7, 7, 9, 9), 'b': ''}
    for stem, text in shown.items():
        (tmp_path / f'Annotations/{stem}.xml').write_text(f'<annotation>{text}</annotation>')
        Image.new('RGB', (20, 20)).save(tmp_path / f'JPEGImages/{stem}.jpg')
    (tmp_path / 'ImageSets/Main/val.txt').write_text('a\nb\n')
    source = open_boxes(str(tmp_path), 'validation')
    assert source.class_names == ['cat', 'dog'] and len(source.dataset) == 1  # b shows nothing
    boxes = source.dataset[0].boxes
    assert localization.whole_image(source) == 0  # 10x10 of 20x20
    assert boxes['cat'].tolist() == [[0, 1, 9, 11], [6, 6, 8, 8]] and boxes['dog'].tolist() == [[2, 2, 4, 4]]
    with pytest.raises(ValueError, match='no list for --split extra; it has: val'):
        open_boxes(str(tmp_path), 'extra')
    (tmp_path / 'Annotations/b.xml').write_text('<annotation>')
    with pytest.raises(ValueError, match='b.xml is missing, damaged'):
        open_boxes(str(tmp_path), 'val')


@pytest.mark.parametrize('elsewhere', [False, True])
def test_class_folders_for_training(birds, tmp_path, elsewhere):
    output = tmp_path / 'folders' if elsewhere else None
    assert cub.make_class_folders(birds, output) == {'train': 4, 'val': 2}
    root = output or birds
    loaders = create_loaders(
        str(root), loader='timm', input_size=(3, 32, 32), batch_size=2, workers=0, num_classes=2)
    assert loaders.class_names == ['001.Auk', '002.Wren']
    assert [len(labels) for _, labels in loaders.val] == [2]
    assert len(open_boxes(str(root), 'validation').dataset) == 2
    with pytest.raises(ValueError, match='train is there already'):
        cub.make_class_folders(birds, output)


def test_a_whole_run(birds, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=2)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    config = evaluation.resolve('localization', dict(
        model=['test_resnet'], checkpoint=[str(tmp_path / 'weights.pth')], num_classes=2, img_size=64, workers=2,
        data_dir=str(birds), output=str(tmp_path / 'out'), device='cpu', localization_pictures=2))
    evaluation.evaluate('localization', config)
    written = json.loads((tmp_path / 'out' / 'localization.json').read_text())
    row = written['rows'][0]
    assert row['pairs'] == 2 and row['map'] == '2x2 of 64x64' and 0 <= row['maxboxacc_v2'] <= 100
    assert written['pictures'] == ['localization.png', 'localization-curves.png']
    config.num_classes = None
    with pytest.raises(ValueError, match='2 classes'):
        localization.class_labels(open_boxes(str(birds), 'validation'), Named(1000))


class Named:
    """A model without class names."""
    label, class_names = 'net', None

    def __init__(self, num_classes):
        self.num_classes = num_classes
