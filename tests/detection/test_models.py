"""Detectors against torchvision's own, the paper's boxes, and a training step on every family of backbones."""
import copy

import pytest
import timm
import torch
import torchvision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList

from detection.models import build_faster_rcnn, build_ssd

SWIN = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
FEW = dict(
    rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=30, rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=30)
FAMILIES = {
    'resnet18': {},
    'test_vit': {},
    'swin_tiny_patch4_window7_224': dict(backbone_kwargs=SWIN),
    'levit_128s': {},
    'preactresnet18': dict(backbone_kwargs=dict(layers=(1, 1, 1, 1), channels=(8, 16, 16, 32), stem_chs=8)),
}


pytestmark = pytest.mark.usefixtures('one_thread')


def build(detector: str, name: str, **kwargs):
    if detector == 'ssd':
        return build_ssd(name, 4, 128, **kwargs)
    size = dict(fixed_size=(64, 128)) if name.startswith('levit') else dict(min_size=64, max_size=96)
    return build_faster_rcnn(name, 4, fpn_channels=32, **size, **FEW, **kwargs)


def batch():
    """Two images of different sizes, one of them without objects."""
    images = [torch.rand(3, 90, 120), torch.rand(3, 100, 80)]
    boxes = torch.tensor([[4., 5., 40., 60.], [50., 20., 110., 80.]])
    targets = [
        dict(boxes=boxes, labels=torch.tensor([1, 3])),
        dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)),
    ]
    return images, targets


def test_faster_rcnn_is_torchvisions():
    """Weights under torchvision's keys give torchvision's detections."""
    reference = FasterRCNN(
        resnet_fpn_backbone(backbone_name='resnet18', weights=None), 5, min_size=96, max_size=128, box_score_thresh=0.0)
    ours = build_faster_rcnn(
        'resnet18', 5, min_size=96, max_size=128, freeze_bn=True, frozen_stages=0, box_score_thresh=0.0)
    ours.load_state_dict(reference.state_dict(), strict=True)
    images, _ = batch()
    with torch.no_grad():
        expected, found = reference.eval()(images), ours.eval()(images)
    assert all(len(e['boxes']) == 100 for e in expected)
    for e, f in zip(expected, found, strict=True):
        assert all(torch.equal(e[key], f[key]) for key in ('boxes', 'scores', 'labels'))


@pytest.mark.parametrize('detector', ['ssd', 'fasterrcnn'])
@pytest.mark.parametrize('name', FAMILIES)
def test_train_step_and_prediction(detector, name):
    model = build(detector, name, **FAMILIES[name])
    images, targets = batch()
    copies = copy.deepcopy((images, targets))
    losses = model(images, targets)
    loss = sum(losses.values())
    assert torch.isfinite(loss) and all(value.dtype == torch.float32 for value in losses.values())
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]  # DDP would wait for them
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert torch.equal(images[0], copies[0][0]) and torch.equal(targets[0]['boxes'], copies[1][0]['boxes'])

    detections = model.eval()(images)
    for image, found in zip(images, detections, strict=True):
        height, width = image.shape[1:]
        assert found['boxes'].shape == (len(found['scores']), 4) and len(found['boxes'])
        assert found['boxes'].min() >= 0 and (found['boxes'] <= torch.tensor([width, height] * 2)).all()
        assert set(found['labels'].tolist()) <= {1, 2, 3}


@pytest.mark.parametrize('detector', ['ssd', 'fasterrcnn'])
def test_training_finds_the_object(detector):
    """A few steps on one image put the best box on its one object: boxes are learned in the image's own pixels."""
    model = build(detector, 'test_resnet')
    image = torch.full((3, 90, 120), 0.1)
    image[:, 20:70, 30:80] = 0.9
    target = dict(boxes=torch.tensor([[30., 20., 80., 70.]]), labels=torch.tensor([2]))
    batch = [image, image.flip(-1)], [target, dict(target, boxes=torch.tensor([[40., 20., 90., 70.]]))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(25):
        optimizer.zero_grad()
        sum(model(*batch).values()).backward()
        optimizer.step()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        model(*batch)
        (found,) = model.eval()([image])
    iou = torchvision.ops.box_iou(found['boxes'][:1], target['boxes'])
    assert iou.item() > 0.6 and found['labels'][0] == 2


@pytest.mark.parametrize('detector', ['ssd', 'fasterrcnn'])
def test_images_are_normalised_once_with_the_backbones_statistics(detector):
    model = build(detector, 'test_vit').eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model([torch.full((3, 64, 96), 0.75)])
    assert model.backbone_report.image_mean == model.backbone_report.image_std == (0.5, 0.5, 0.5)
    torch.testing.assert_close(seen[0][0, :, :64, :96], torch.full((3, 64, 96), 0.5))
    model = build(detector, 'test_vit', image_mean=(0.25,) * 3, image_std=(0.25,) * 3).eval()
    assert model.transform.image_mean == [0.25] * 3 and model.transform.image_std == [0.25] * 3


def default_boxes(model, size: int) -> torch.Tensor:
    """Default boxes in pixels."""
    x = torch.zeros(1, 3, size, size)
    with torch.no_grad():
        maps = list(model.backbone.eval()(x).values())
    return model.anchor_generator(ImageList(x, [(size, size)]), maps)[0]


def test_ssd300_has_the_boxes_of_the_paper():
    ours = build_ssd('resnet50', 21)
    boxes = default_boxes(ours, 300)
    paper = DefaultBoxGenerator(  # the constants of the paper and of torchvision's ssd300_vgg16
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]], scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        steps=[8, 16, 32, 64, 100, 300])
    x = torch.zeros(1, 3, 300, 300)
    expected = paper(ImageList(x, [(300, 300)]), [torch.zeros(1, 1, n, n) for n in (38, 19, 10, 5, 3, 1)])[0]
    assert boxes.shape == (8732, 4)
    torch.testing.assert_close(boxes, expected)
    assert ours.backbone.out_channels == [512, 1024, 2048, 512, 256, 256]
    conv4 = build_ssd('resnet18', 21, conv4_stride1=True)
    torch.testing.assert_close(default_boxes(conv4, 300), boxes)
    assert conv4.backbone.out_channels == [256, 512, 512, 256, 256, 256]
    assert not any(key.startswith('layer4') for key in conv4.backbone.body.state_dict())
    with pytest.raises(ValueError, match='conv4_stride1 is for ResNets, not test_vit'):
        build_ssd('test_vit', 21, conv4_stride1=True)


def test_ssd512_has_the_boxes_of_the_paper():
    model = build_ssd('test_resnet', 21, 512)
    assert model.backbone.steps == [8, 16, 32, 64, 128, 256, 512]
    assert len(default_boxes(model, 512)) == 24564


@pytest.mark.parametrize('name, sides', [('test_convnext', [37, 18, 9, 5, 3, 1]), ('test_vit', [38, 19, 10, 5, 3, 1])])
def test_ssd_boxes_sit_on_the_maps(name, sides):
    """Grids are what the network gives, not what a ResNet would; box i of a map is centred on position i."""
    model = build_ssd(name, 21)
    boxes = default_boxes(model, 300)
    per_position = model.anchor_generator.num_anchors_per_location()
    assert len(boxes) == sum(side ** 2 * n for side, n in zip(sides, per_position, strict=True))
    row = boxes[:sides[0] * per_position[0]:per_position[0]]
    torch.testing.assert_close((row[:, 0] + row[:, 2]) / 2, (torch.arange(sides[0]) + 0.5) * 8)


def test_anchors_are_eight_strides_wide():
    """Also where the strides are not a ResNet's: LeViT's levels have 16, 32, 64 and 128."""
    model = build_faster_rcnn('levit_128s', 3, fixed_size=(128, 128))
    assert model.rpn.anchor_generator.sizes == ((128,), (256,), (512,), (1024,))
    assert model.roi_heads.box_roi_pool.featmap_names == ['0', '1', '2']
    standard = FasterRCNN(resnet_fpn_backbone(backbone_name='resnet18', weights=None), 3).rpn.anchor_generator
    ours = build_faster_rcnn('test_resnet', 3).rpn.anchor_generator
    assert (ours.sizes, ours.aspect_ratios) == (standard.sizes, standard.aspect_ratios)


@pytest.mark.parametrize('detector', ['ssd', 'fasterrcnn'])
def test_autocast(detector):
    """Losses and boxes under autocast are those of float32; coordinates keep more digits than bfloat16 has."""
    model = build(detector, 'test_resnet')
    images, targets = batch()
    results = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            results.append(model.train()(images, targets))
    assert all(value.dtype == torch.float32 for value in results[1].values())
    torch.testing.assert_close(results[1], results[0], rtol=0.05, atol=0.02)
    sum(results[1].values()).backward()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        found = model.eval()(images)[0]
    assert found['boxes'].dtype == found['scores'].dtype == torch.float32
    assert not torch.equal(found['boxes'], found['boxes'].bfloat16().float())


def test_weights_freeze_as_torchvision_does(tmp_path):
    """With weights Faster R-CNN freezes batch norm and the first stage, SSD trains all; without, both train all."""
    timm.models.save_for_hf(timm.create_model('test_resnet'), tmp_path, safe_serialization=True)
    frozen = build_faster_rcnn('test_resnet', 3, tmp_path).train()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.modules())
    assert not any(p.requires_grad for p in frozen.backbone.body.layer1.parameters())
    assert all(p.requires_grad for p in frozen.backbone.body.layer2.parameters())
    for model in (build_faster_rcnn('test_resnet', 3), build_ssd('test_resnet', 3, 64, tmp_path)):
        assert all(p.requires_grad for p in model.parameters())
        assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


def test_rebuilt_detector_predicts_the_same(tmp_path):
    """The report rebuilds a detector without the weights' file; EMA copies a detector by deepcopy."""
    timm.models.save_for_hf(timm.create_model('test_resnet'), tmp_path, safe_serialization=True)
    model = build('ssd', 'test_resnet', weights=tmp_path, freeze_bn=True).eval()
    report = model.backbone_report
    again = build_ssd(
        report.arch, 4, 128, freeze_bn=True, image_mean=report.image_mean, image_std=report.image_std,
        backbone_kwargs=report.kwargs).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    images, _ = batch()
    expected = model(images)[0]
    for other in (again, copy.deepcopy(model)):
        torch.testing.assert_close(other(images)[0], expected, rtol=0, atol=0)


def test_errors():
    with pytest.raises(ValueError, match=r'fixed_size \(224, 224\) is no multiple of 64.*fixed_size=\(256, 256\)'):
        build_faster_rcnn('levit_128s', 3, fixed_size=(224, 224))
    with pytest.raises(ValueError, match='SSD at size 16 has 2 maps on preactresnet18'):
        build_ssd('preactresnet18', 3, 16)
    with pytest.raises(ValueError, match='inception_v3 cannot give a feature pyramid'):
        build_ssd('inception_v3', 3, 128)
