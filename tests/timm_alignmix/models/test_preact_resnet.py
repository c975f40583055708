"""The pre-activation networks against a forward pass written out by hand, hand-counted parameters and timm's habits."""
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay

from timm_alignmix.models import PreActBlock

NAMES = ('preactresnet18', 'preactresnet18_alignmixup', 'wrn16_8')


def randomise_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Give the norms weights and statistics that are not 1 and 0, so that leaving one out is seen."""
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            for t in (m.weight.data, m.running_var):
                t.uniform_(0.5, 1.5)
            for t in (m.bias.data, m.running_mean):
                t.normal_(std=0.2)
    return model


def textbook_forward(sd: dict, x: torch.Tensor, depths: tuple, stem_stride=1, release=False) -> torch.Tensor:
    """Logits from the tensors of a state dict and torch.nn.functional alone."""
    def norm_relu(name, x):
        p = [sd[f'{name}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')]
        return F.relu(F.batch_norm(x, *p))

    x = F.conv2d(x, sd['conv1.weight'], stride=stem_stride, padding=1)
    if release:
        x = norm_relu('bn1', x)
    for i, depth in enumerate(depths):
        for j in range(depth):
            block = f'layer{i + 1}.{j}'
            stride = 2 if i > 0 and j == 0 else 1
            a = norm_relu(f'{block}.norm1', x)
            y = F.conv2d(a, sd[f'{block}.conv1.weight'], stride=stride, padding=1)
            y = F.conv2d(norm_relu(f'{block}.norm2', y), sd[f'{block}.conv2.weight'], padding=1)
            if f'{block}.downsample.weight' in sd:
                y = y + F.conv2d(a, sd[f'{block}.downsample.weight'], stride=stride)
            else:
                y = y + (a if release else x)
            x = y
    if 'norm.weight' in sd:
        x = norm_relu('norm', x)
    return F.linear(x.mean((2, 3)), sd['fc.weight'], sd['fc.bias'])


@pytest.mark.parametrize('name, kwargs, textbook', [
    ('preactresnet18', {}, dict(depths=(2, 2, 2, 2))),
    ('preactresnet18', dict(stem_stride=2, final_norm=True), dict(depths=(2, 2, 2, 2), stem_stride=2)),
    ('preactresnet18_alignmixup', {}, dict(depths=(2, 2, 2, 2), release=True)),
    ('wrn16_8', {}, dict(depths=(2, 2, 2))),
])
def test_forward_is_the_textbook_one(name, kwargs, textbook):
    model = randomise_norms(timm.create_model(name, num_classes=7, **kwargs)).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), textbook_forward(model.state_dict(), x, **textbook))


def hand_count(stem: int, widths: tuple, final_norm: bool, stem_norm: bool, classes: int) -> int:
    """Parameters of the network with two blocks a stage, counted term by term."""
    total = 27 * stem + (2 * stem if stem_norm else 0)
    prev = stem
    for i, w in enumerate(widths):
        first = 2 * prev + 9 * prev * w + 2 * w + 9 * w * w + (prev * w if i > 0 or prev != w else 0)
        total += first + 2 * (2 * w + 9 * w * w)
        prev = w
    return total + (2 * prev if final_norm else 0) + prev * classes + classes


R18_WIDTHS = (64, 128, 256, 512)


@pytest.mark.parametrize('name, count, shape', [
    ('preactresnet18', 11_171_146, dict(stem=64, widths=R18_WIDTHS, final_norm=False, stem_norm=False)),
    ('preactresnet18_alignmixup', 11_171_274, dict(stem=64, widths=R18_WIDTHS, final_norm=False, stem_norm=True)),
    ('wrn16_8', 10_961_370, dict(stem=16, widths=(128, 256, 512), final_norm=True, stem_norm=False)),
])
def test_parameter_count(name, count, shape):
    model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count == hand_count(**shape, classes=10)


@pytest.mark.parametrize('skip_preact', [False, True])
def test_skip_of_a_block_without_residual(skip_preact):
    """With the second convolution at zero a block is its skip: x, or relu(bn1(x)) in AlignMixup's public code."""
    block = randomise_norms(PreActBlock(4, 4, skip_preact=skip_preact)).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 5, 5)
    n = block.norm1
    scale = n.weight / (n.running_var + 1e-5).sqrt()
    normed = (x - n.running_mean[:, None, None]) * scale[:, None, None] + n.bias[:, None, None]
    expected = normed.clamp(min=0) if skip_preact else x
    torch.testing.assert_close(block(x), expected)
    assert not torch.allclose(normed.clamp(min=0), x, atol=0.1)


@pytest.mark.parametrize('name', NAMES)
def test_head_and_features_as_timm_expects(name):
    model = timm.create_model(name, num_classes=5, in_chans=1, drop_rate=0.5).eval()
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        features = model.forward_features(x)
        logits = model(x)
        pre_logits = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(model.forward_head(features), logits)
        torch.testing.assert_close(model.get_classifier()(pre_logits), logits)
        assert pre_logits.shape == (2, model.head_hidden_size) and logits.shape == (2, 5)

        maps = timm.create_model(name, in_chans=1, features_only=True).eval()
        maps.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('fc.')}, strict=True)
        out = maps(x)
    torch.testing.assert_close(out[-1], features)
    assert [f.shape[1] for f in out] == maps.feature_info.channels()
    assert [32 // f.shape[-1] for f in out] == maps.feature_info.reduction()

    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0, '')
    torch.testing.assert_close(model(x), features)


def test_dropout_before_the_classifier_in_training_only():
    model = timm.create_model('preactresnet18', drop_rate=0.5)
    features = torch.ones(4, 512, 1, 1)
    kept = model.forward_head(features, pre_logits=True)
    assert set(kept.unique().tolist()) == {0., 2.}
    assert model.eval().forward_head(features, pre_logits=True).eq(1).all()


def test_layer_decay_groups_follow_the_depth():
    model = timm.create_model('wrn16_8')
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): g['lr_scale'] for g in groups for p in g['params']}
    order = [model.conv1, model.layer1[0].conv1, model.layer1[1].conv1, model.layer3[1].conv1, model.fc]
    scales = [scale[id(m.weight)] for m in order]
    assert scales == sorted(scales) and len(set(scales)) == len(scales)


def test_grad_checkpointing_changes_no_gradient():
    model = timm.create_model('preactresnet18').eval()
    x = torch.randn(1, 3, 16, 16)
    plain = torch.autograd.grad(model(x).square().sum(), model.conv1.weight)[0]
    model.set_grad_checkpointing()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        loss = model(x).square().sum()
    assert len(saved) < 25  # 13, with torch 2.5 21, instead of 155: only what enters the blocks and the head
    torch.testing.assert_close(torch.autograd.grad(loss, model.conv1.weight)[0], plain)
