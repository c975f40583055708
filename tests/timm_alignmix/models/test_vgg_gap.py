"""VGG-GAP against torch.nn.functional, timm's VGG-16 and every mix."""
import pytest
import timm
import torch
import torch.nn.functional as F

import timm_alignmix

TINY = ((4, 1), (6, 1), (8, 1), (8, 1), (8, 2))


@pytest.fixture
def tiny():
    return timm.create_model('vgg16_gap', stages=TINY, gap_chs=16, num_classes=5)


def test_forward_is_the_textbook_one(tiny):
    tiny.double().eval()
    sd = tiny.state_dict()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    y = x
    for i, names in enumerate((['0'], ['3'], ['6'], ['9'], ['12', '14'])):
        y = F.max_pool2d(y, 2) if i else y
        for name in names:
            y = F.relu(F.conv2d(y, sd[f'features.{name}.weight'], sd[f'features.{name}.bias'], padding=1))
    y = F.relu(F.conv2d(y, sd['conv6.weight'], sd['conv6.bias'], padding=1))
    assert y.shape == (2, 16, 4, 4)  # 224 px: 14x14
    with torch.no_grad():
        torch.testing.assert_close(tiny.forward_features(x), y)
        torch.testing.assert_close(tiny(x), F.linear(y.mean((2, 3)), sd['fc.weight'], sd['fc.bias']))


def test_sizes_and_names_are_those_of_vgg16():
    with torch.device('meta'):
        model, vgg = timm.create_model('vgg16_gap'), timm.create_model('vgg16')
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    convs = {name: value.shape for name, value in vgg.state_dict().items() if name.startswith('features.')}
    assert {name: shape for name, shape in shapes.items() if name.startswith('features.')} == convs
    added = 512 * 9 * 1024 + 1024 + 1024 * 1000 + 1000
    assert sum(shape.numel() for shape in shapes.values()) == 14_714_688 + added  # 14.71 M: VGG-16's convolutions


def test_timm_interface(tiny):
    tiny.eval()
    x = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        features = tiny.forward_features(x)
        pre_logits = tiny.forward_head(features, pre_logits=True)
        torch.testing.assert_close(tiny.get_classifier()(pre_logits), tiny(x))
        maps = timm.create_model('vgg16_gap', stages=TINY, gap_chs=16, features_only=True).eval()
        names = {k: k.replace('features.', 'features_') for k in tiny.state_dict() if not k.startswith('fc.')}
        maps.load_state_dict({names[k]: v for k, v in tiny.state_dict().items() if k in names})
        out = maps(x)
    torch.testing.assert_close(out[-1], features)
    assert [f.shape[1] for f in out] == maps.feature_info.channels()
    assert [48 // f.shape[2] for f in out] == maps.feature_info.reduction()
    tiny.reset_classifier(3)
    assert tiny(x).shape == (2, 3)
    tiny.reset_classifier(0, '')
    torch.testing.assert_close(tiny(x), features)


@pytest.mark.parametrize('mix', sorted(set(timm_alignmix.list_mixes()) - {'tokenmix', 'transmix'}))
def test_every_mix_trains_it(tiny, mix):
    task = timm_alignmix.MixTask(tiny, mix=mix, img_size=64, verbose=False)
    for _ in range(4):  # input and feature modes
        task(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]))['loss'].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tiny.parameters())
    if mix == 'alignmix':
        assert list(task.mix.layers) == ['features.15']  # before the added convolution, which sees positions
    if mix == 'densemultimix':
        assert task.mix.head.name == 'act6' and task.mix.head.exact_mean


def test_weights_of_vgg16_fill_its_convolutions(tiny, tmp_path):
    """A file as timm's hub holds it: the convolutions are loaded, the added layers keep a random start."""
    convs = {name: torch.randn_like(v) for name, v in tiny.state_dict().items() if name.startswith('features.')}
    file = tmp_path / 'vgg16.pth'

    def load(state, num_classes):
        torch.save(state | {'pre_logits.fc1.weight': torch.zeros(4), 'head.fc.weight': torch.zeros(1000, 4)}, file)
        return timm.create_model(
            'vgg16_gap', stages=TINY, gap_chs=16, num_classes=num_classes, pretrained=True,
            pretrained_cfg_overlay=dict(file=str(file))).state_dict()

    for num_classes in (1000, 5):
        loaded = load(convs, num_classes)
        assert all(torch.equal(loaded[name], value) for name, value in convs.items())
        assert loaded['conv6.weight'].std() > 0 and loaded['fc.weight'].shape == (num_classes, 16)
    convs.pop('features.3.weight')
    with pytest.raises(KeyError, match='features.3.weight'):
        load(convs, 5)
