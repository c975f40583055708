"""Backbones against torchvision's, against the classification networks they come from, and against gradients."""
import copy

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from alignmix_lab.classification import TrainConfig
from detection import pretrained
from detection.backbones import Backbone, PyramidBackbone, SimpleFeaturePyramid, create_backbone, layer_decay_groups
from timm_alignmix import weights

SWIN = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
# name, arguments that make it small, (H, W) where it takes one size only
FAMILIES = {
    'resnet': ('test_resnet', {}, None),
    'efficientnet': ('test_efficientnet', {}, None),
    'vit': ('test_vit', {}, None),
    'swin': ('swin_tiny_patch4_window7_224', SWIN, None),
    'levit': ('levit_128s', {}, (64, 128)),
    'preactresnet': ('preactresnet18', dict(layers=(1, 1, 1, 1), channels=(8, 16, 16, 32), stem_chs=8), None),
}


pytestmark = pytest.mark.usefixtures('one_thread')


def families(*names):
    return pytest.mark.parametrize('family', names)


def create(family: str, **kwargs) -> PyramidBackbone:
    name, small, size = FAMILIES[family]
    kwargs = {'image_size': size, 'backbone_kwargs': small, **kwargs}
    return create_backbone(PyramidBackbone, name, **kwargs)


def randomise(model: nn.Module) -> nn.Module:
    """Make every tensor of a model its own, so that one left out or mixed up is seen."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(std=0.1)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_var.uniform_(0.5, 1.5)
            norm.weight.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """Callable: folder with exported weights of a family and the classification model in it."""
    made = {}

    def export(family: str):
        if family not in made:
            name, small, _ = FAMILIES[family]
            folder = tmp_path_factory.mktemp(family)
            model = randomise(timm.create_model(name, num_classes=7, **small)).eval()
            model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
            weights.export(model, folder)
            made[family] = folder, model
        return made[family]
    return export


def test_resnet50_pyramid_is_torchvisions():
    reference = randomise(resnet_fpn_backbone(backbone_name='resnet50', weights=None, trainable_layers=3))
    for norm in (m for n, m in reference.named_modules() if n.endswith(('bn1', 'bn2', 'bn3', 'downsample.1'))):
        norm.running_var.uniform_(0.5, 1.5)
    ours = create_backbone(PyramidBackbone, 'resnet50', freeze_bn=True, frozen_stages=1)
    ours.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, found = reference(x), ours(x)
    assert list(found) == list(expected) == ['0', '1', '2', '3', 'pool']
    assert all((found[key] - expected[key]).abs().max() == 0 for key in expected)
    assert expected['3'].std() > 0

    def trainable(model):
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable(ours) == trainable(reference)


@pytest.mark.parametrize('family, strides, channels, levels', [
    ('resnet', (4, 8, 16, 32), None, (4, 8, 16, 32, 64)),
    ('vit', (16,), (64,), (4, 8, 16, 32, 64)),
    ('swin', (4, 8, 16, 32), (24, 48, 96, 192), (4, 8, 16, 32, 64)),
    ('levit', (16, 32, 64), (128, 256, 384), (16, 32, 64, 128)),
    ('preactresnet', (4, 8), (16, 32), (4, 8, 16)),
])
def test_strides_and_channels(family, strides, channels, levels):
    net = create(family, image_size=FAMILIES[family][2]).eval()
    assert net.strides == strides and net.levels == levels
    assert channels is None or net.channels == channels
    with torch.no_grad():
        out = net(torch.randn(2, 3, 64, 128))
    assert [tuple(f.shape) for f in out.values()] == [(2, 256, -(-64 // s), -(-128 // s)) for s in levels]


def last_map(model: nn.Module, family: str, x: torch.Tensor) -> torch.Tensor:
    """Output of the module that ends a classification model's last stage, as NCHW, caught by a hook."""
    name = {'resnet': 'layer4', 'vit': 'blocks.5', 'swin': 'layers.3', 'preactresnet': 'layer4'}[family]
    caught = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: caught.append(out))
    model(x)
    handle.remove()
    if family == 'vit':
        return caught[0][:, 1:].transpose(1, 2).unflatten(2, (x.shape[2] // 16, x.shape[3] // 16))
    return caught[0].permute(0, 3, 1, 2) if family == 'swin' else caught[0]


@families('resnet', 'vit', 'swin', 'levit', 'preactresnet')
def test_exported_weights_fill_every_key(family, exported):
    folder, model = exported(family)
    net = create(family, weights=folder).eval()
    source, body = model.state_dict(), net.body.state_dict()
    resized = {key for key in body if key.endswith('attention_biases')} if family == 'levit' else set()
    assert all(torch.equal(body[key], source[key]) for key in body if key not in resized)
    assert net.report.loaded == len(body) and set(net.report.resized) == resized
    assert set(net.report.dropped) == source.keys() - body.keys()
    assert all(key.startswith(('head', 'fc', 'norm')) for key in net.report.dropped)
    assert (net.report.image_mean, net.report.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    if family != 'levit':
        x = torch.randn(1, 3, *model.pretrained_cfg['input_size'][1:])
        with torch.no_grad():
            torch.testing.assert_close(net.maps(x)[-1], last_map(model, family, x))


@families('resnet', 'vit', 'levit', 'swin')
def test_a_file_that_misses_a_backbone_key_is_refused(family, exported, tmp_path):
    folder, model = exported(family)
    state = load_file(folder / 'model.safetensors')
    lost = [key for key in model.state_dict() if not key.startswith(('fc', 'head'))][3:5]
    (tmp_path / 'config.json').write_text((folder / 'config.json').read_text())
    save_file({key: value for key, value in state.items() if key not in lost}, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match=f'missing keys: {lost[0]}, {lost[1]}$'):
        create(family, weights=tmp_path)
    save_file({f'model.{key}': value for key, value in state.items()}, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match=r'missing keys: .*; unexpected keys: model\.'):
        create(family, weights=tmp_path)


def training_checkpoint(path, model: nn.Module, name: str, **config):
    """What train_imagenet.py saves, with another moving average and the prefix of a wrapped model."""
    state = {f'module.{key}': value for key, value in model.state_dict().items()}
    torch.save(dict(
        arch=name, args=TrainConfig(model=name, **config).to_dict(), optimizer={}, epoch=1, state_dict=state,
        state_dict_ema={key: value + 1 for key, value in state.items()},
    ), path)
    return path


def test_training_checkpoint(tmp_path):
    kwargs = dict(class_token=False, global_pool='avg', fc_norm=False)
    model = timm.create_model('test_vit', num_classes=5, **kwargs)
    path = training_checkpoint(
        tmp_path / 'last.pth.tar', model, 'test_vit', model_kwargs=kwargs, mean=[0.2] * 3, std=[0.3] * 3)
    raw, ema = (create('vit', weights=path, use_ema=use_ema) for use_ema in (False, True))
    weight = model.blocks[3].mlp.fc1.weight
    assert torch.equal(raw.body.blocks[3].mlp.fc1.weight, weight)
    assert torch.equal(ema.body.blocks[3].mlp.fc1.weight, weight + 1)
    assert 'moving average' in str(ema.report) and 'moving average' not in str(raw.report)
    assert ema.body.cls_token is None  # the network that was trained, not timm's default of that name
    assert (raw.report.image_mean, raw.report.image_std) == ((0.2,) * 3, (0.3,) * 3)
    with pytest.raises(ValueError, match='are of test_vit, the backbone is test_resnet'):
        create_backbone(PyramidBackbone, 'test_resnet', path)


@families('resnet', 'vit')
def test_tag_of_the_local_registry(family, exported, tmp_path, monkeypatch, own_tables):
    folder, model = exported(family)
    monkeypatch.setenv('TIMM_ALIGNMIX_WEIGHTS', str(tmp_path))
    name = weights.install(folder, tag='mixed_photos')
    net = create_backbone(PyramidBackbone, FAMILIES[family][0], name)
    source = model.state_dict()
    assert all(torch.equal(value, source[key]) for key, value in net.body.state_dict().items())
    assert net.report.weights == name and net.report.image_mean == (0.1, 0.2, 0.3)


def test_random_weights_of_a_folder_are_random(exported, caplog):
    folder, model = exported('resnet')
    net = create_backbone(PyramidBackbone, str(folder))
    assert net.report.weights is None and net.report.loaded == 0 and 'random weights' in str(net.report)
    assert not torch.equal(net.body.conv1[0].weight, model.conv1[0].weight)
    assert 'pass weights=' in caplog.text


def test_rebuilding_from_the_report(exported):
    net = create('swin', weights=exported('swin')[0])
    report = net.report
    again = create_backbone(
        PyramidBackbone, report.arch, backbone_kwargs=report.kwargs, image_mean=report.image_mean,
        image_std=report.image_std)
    again.load_state_dict(net.state_dict(), strict=True)
    assert (again.report.image_mean, again.report.strides) == (report.image_mean, report.strides)


@families('resnet', 'efficientnet', 'levit', 'preactresnet')
def test_frozen_batch_norm(family, exported):
    """Output and statistics of a network in evaluation, whatever its mode, also through deepcopy."""
    torch.manual_seed(1)
    live = randomise(create(family))
    frozen = create(family)
    frozen.freeze_batch_norm()
    state = live.state_dict()
    frozen.load_state_dict({key: state[key] for key in frozen.state_dict()})
    frozen = copy.deepcopy(frozen)
    x = torch.randn(2, 3, 64, 128)
    before = copy.deepcopy(frozen.state_dict())
    with torch.no_grad():
        expected, found = live.eval().maps(x), frozen.train().maps(x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    with torch.no_grad():
        assert not torch.allclose(live.train().maps(x)[-1], expected[-1], rtol=1e-2, atol=1e-2)
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    assert not [n for n, p in frozen.body.named_parameters() if p.requires_grad and 'bn' in n and 'ln' not in n]


@pytest.mark.parametrize('family, count', [
    ('resnet', 1), ('resnet', 2), ('efficientnet', 2), ('vit', 3), ('swin', 1), ('levit', 2), ('preactresnet', 1)])
def test_frozen_stages_are_what_reaches_the_stage(family, count):
    """The parameters on which the stage's output depends, by autograd, are those that freeze_stages freezes."""
    net = create(family).eval()
    caught = []
    net.body.get_submodule(net.stages[count - 1]).register_forward_hook(lambda m, args, out: caught.append(out))
    net.maps(torch.randn(1, 3, 64, 128))
    named = dict(net.body.named_parameters())
    grads = torch.autograd.grad(caught[0].square().sum(), list(named.values()), allow_unused=True)
    reaching = {name for name, grad in zip(named, grads, strict=True) if grad is not None}
    assert 0 < len(reaching) < len(named)
    net.freeze_stages(count)
    net.train()
    assert {name for name, p in net.body.named_parameters() if p.requires_grad} == named.keys() - reaching
    for name, module in net.body.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            assert f'{name}.weight' not in reaching
    with pytest.raises(ValueError, match=f'stages to freeze, not {len(net.stages) + 1}'):
        net.freeze_stages(len(net.stages) + 1)


def test_offset_table_keeps_its_ends():
    """Attention biases per offset: zero stays zero, the largest the largest, rows stay rows."""
    table = torch.randn(3, 14 * 10)
    new = pretrained.resize_offset_table(table, (14, 10), (20, 16)).view(3, 20, 16)
    old = table.view(3, 14, 10)
    torch.testing.assert_close(new[:, [0, 0, -1, -1], [0, -1, 0, -1]], old[:, [0, 0, -1, -1], [0, -1, 0, -1]])
    rows = torch.arange(14.).view(14, 1).expand(14, 10).reshape(1, -1)
    out = pretrained.resize_offset_table(rows, (14, 10), (27, 10)).view(27, 10)
    assert (out == out[:, :1]).all()  # no column differs
    torch.testing.assert_close(out[::2, 0], torch.arange(14.))  # every second new offset is an old one
    torch.testing.assert_close(pretrained.resize_offset_table(table, (14, 10), (14, 10)), table)


def test_levit_biases_follow_the_image_size(exported):
    """No offset and the largest offset keep their biases at another image size."""
    folder, _ = exported('levit')
    net = create('levit', weights=folder)
    attn = net.body.stages[0].blocks[0].attn
    assert attn.resolution == (4, 8) and attn.attention_biases.shape[1] == 32
    source = load_file(folder / 'model.safetensors')['stages.0.blocks.0.attn.attention_biases'].view(-1, 14, 14)
    torch.testing.assert_close(attn.attention_biases.detach().view(-1, 4, 8)[:, 0, 0], source[:, 0, 0])
    torch.testing.assert_close(attn.attention_biases.detach().view(-1, 4, 8)[:, 3, 7], source[:, 13, 13])


@families('vit', 'resnet')
def test_layer_decay_follows_the_depth(family):
    detector = nn.Module()
    detector.backbone = create(family, frozen_stages=1)
    detector.head = nn.Linear(4, 4)
    groups = layer_decay_groups(detector, layer_decay=0.5, weight_decay=0.1)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    assert sum(len(group['params']) for group in groups) == len(scale)
    assert scale.keys() == {id(p) for p in detector.parameters() if p.requires_grad}
    body = detector.backbone.body
    if family == 'vit':
        order = [body.blocks[i].mlp.fc1 for i in (1, 3, 5)]
    else:
        order = [body.layer2[0].conv1, body.layer4[0].conv1]
    depth = [scale[id(layer.weight)] for layer in order] + [scale[id(detector.head.weight)]]
    assert depth == sorted(depth) and depth[0] < depth[-2] <= depth[-1] == 1
    decayed = {id(p) for group in groups if group['weight_decay'] for p in group['params']}
    assert id(detector.head.weight) in decayed and id(detector.head.bias) not in decayed
    detector.backbone_report = create('preactresnet').report
    detector.backbone = create('preactresnet')
    with pytest.raises(ValueError, match='preactresnet18 has no group_matcher'):
        layer_decay_groups(detector, layer_decay=0.5, weight_decay=0.1)


def test_simple_feature_pyramid_rounds_up():
    pyramid = SimpleFeaturePyramid(32, 8, scales=(4, 2, 1, 0.5, 0.25))
    sides = [f.shape[-1] for f in pyramid({'0': torch.randn(1, 32, 19, 19)}).values()]
    assert sides == [76, 38, 19, 10, 5]


class Wrong(nn.Module):
    """A network that misdescribes its maps."""
    def __init__(self, shape: tuple, reduction: int):
        super().__init__()
        self.feature_info = [dict(num_chs=8, reduction=reduction, module='conv')]
        self.shape = shape

    def forward_intermediates(self, x, **kwargs):
        return [torch.zeros(self.shape)]


@pytest.mark.parametrize('shape, reduction', [
    ((1, 16, 4, 6), 16),  # other channels
    ((1, 4, 6, 8), 16),  # channels last
    ((1, 8, 8, 12), 16),  # twice as fine
])
def test_misdescribed_maps_are_refused(shape, reduction):
    with pytest.raises(ValueError, match='a_name cannot give a feature pyramid: .* is not 8 channels at stride 16'):
        Backbone(Wrong(shape, reduction), 'a_name')


def test_no_pyramid():
    with pytest.raises(ValueError, match='a_name cannot give a feature pyramid: it has no feature_info'):
        Backbone(nn.Linear(3, 3), 'a_name')
    with pytest.raises(ValueError, match=r'test_vit has strides \(14,\)'):
        create_backbone(PyramidBackbone, 'test_vit', backbone_kwargs=dict(patch_size=14, img_size=168))
    with pytest.raises(ValueError, match='levit_128s cannot give .* one size only: pass fixed_size'):
        create_backbone(PyramidBackbone, 'levit_128s')
    with pytest.raises(ValueError, match='no_such_model'):
        create_backbone(PyramidBackbone, 'no_such_model')
    with pytest.raises(ValueError, match='1 channels; the detectors take RGB'):
        pretrained._describe(timm.create_model('test_resnet', in_chans=1), None)
