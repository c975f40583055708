"""The split of a model is compared with the model's own forward, hooked by hand here."""
import pytest
import timm
import torch
import torch.nn.functional as F

from timm_alignmix import Anatomy, MixTask, UnsupportedModel, dense_model_kwargs

DENSE_VIT = dict(global_pool='avg', class_token=False, fc_norm=False)
# name, create_model kwargs, image size, layer to align at and its positions, positions of the dense head (None:
# refused).
MODELS = [
    ('resnet50', {}, 96, ('layer3', 36), 9),
    ('vit_small_patch16_224', dict(img_size=96), 96, ('blocks.5', 36), None),
    ('vit_small_patch16_224', dict(img_size=96, **DENSE_VIT), 96, ('blocks.5', 36), 36),
    ('vit_small_patch16_224', dict(img_size=96, global_pool='avg'), 96, ('blocks.5', 36), 36),
    ('levit_128s', {}, 224, ('stem', 196), 16),
    ('levit_conv_128s', {}, 224, ('stem', 196), 16),
    ('convnext_tiny', {}, 96, ('stages.2', 36), 9),
    ('swin_tiny_patch4_window7_224', {}, 224, ('layers.2', 196), 49),
    ('efficientnet_b0', {}, 96, ('blocks.4', 36), 9),
    ('vgg16', {}, 64, ('features.29', 16), None),
    ('regnety_004', {}, 96, ('s3', 36), 9),
    ('deit_small_distilled_patch16_224', dict(img_size=96), 96, ('blocks.5', 36), None),
]
NOT_EXACT_MEAN = [('convnext_tiny', {}), ('vit_small_patch16_224', dict(img_size=96, global_pool='avg'))]
IDS = [f'{name}-{"-".join(kwargs) or "default"}' for name, kwargs, *_ in MODELS]


@pytest.fixture(scope='module', params=MODELS, ids=IDS)
def examined(request):
    name, kwargs, size, *expected = request.param
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **kwargs).eval()
    return model, Anatomy(model, img_size=size), torch.randn(3, 3, size, size), (name, kwargs), expected


def hooked(model, name, replace, x, pre=False):
    module = model.get_submodule(name)
    register = module.register_forward_pre_hook if pre else module.register_forward_hook
    handle = register(replace)
    try:
        with torch.no_grad():
            return model(x)
    finally:
        handle.remove()


def test_mixing_embeddings_is_mixing_logits(examined):
    model, anatomy, x, *_ = examined
    weights = torch.softmax(torch.randn(3, 3), dim=1)
    with torch.no_grad():
        logits = model(x)
    handles = [
        model.get_submodule(call.name).register_forward_pre_hook(
            lambda module, args: (torch.einsum('nb,b...->n...', weights, args[0]),))
        for call in anatomy.linear_heads()
    ]
    with torch.no_grad():
        mixed = model(x)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(mixed, weights @ logits, rtol=1e-4, atol=1e-5)


def test_align_layer_is_the_expected_cut(examined):
    model, anatomy, x, _, (expected, _) = examined
    layer = anatomy.align_layer()
    assert (layer.name, layer.num_positions) == expected
    seen = []
    with torch.no_grad():
        logits = model(x)
    hooked(model, layer.name, lambda m, args, out: seen.append(out), x)
    # Taking the features apart and together again changes nothing, and they alone decide the logits.
    features = seen[0]
    prefix = features[:, :layer.layout.prefix] if layer.layout.prefix else None
    rebuilt = layer.layout.restore(layer.layout.positions(features).clone(), features, prefix)
    assert torch.equal(rebuilt, features)
    other = hooked(model, layer.name, lambda m, args, out: rebuilt, torch.randn_like(x))
    torch.testing.assert_close(other, logits)


def test_dense_head_against_the_model(examined):
    model, anatomy, x, key, (_, positions) = examined
    if positions is None:
        with pytest.raises(UnsupportedModel, match='class token|multimix'):
            anatomy.dense_head()
        return
    head = anatomy.dense_head()
    seen = []
    with torch.no_grad():
        logits = model(x)
    hooked(model, head.name, lambda m, args, out: seen.append(out), x)
    with torch.no_grad():
        dense_BRC, embed_BDR = head(seen[0])
    assert dense_BRC.shape == (3, positions, 7) and head.positions_at(x) == positions
    assert head.exact_mean == (key not in NOT_EXACT_MEAN)
    if head.exact_mean:
        torch.testing.assert_close(dense_BRC.mean(dim=1), logits, rtol=1e-4, atol=1e-5)
    # The embedding and the classifier's weight belong together: logits minus W z is the bias, everywhere.
    bias = dense_BRC - torch.einsum('bdr,cd->brc', embed_BDR, head.weight())
    torch.testing.assert_close(bias, bias[:1, :1].expand_as(bias), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', ['levit_128s', 'levit_conv_128s', 'repvit_m0_9'])
def test_head_batchnorm_in_training(name):
    """Positions are normalised by the pooled batch: textbook BatchNorm written out, in train mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).double().train()
    head = Anatomy(model).dense_head()
    feature_map = torch.randn(6, *_feature_shape(model, head))
    logits_BRC, _ = head(feature_map.double())
    feat_BRD = head.layout.positions(feature_map.double()).transpose(1, 2)
    pooled = feat_BRD.mean(dim=1)
    outs = []
    for prefix in ('head', 'head_dist'):
        part = model.get_submodule(prefix)
        bn, linear = (part.bn, part.linear) if hasattr(part, 'bn') else (part.head.bn, part.head.l)
        mean, var = pooled.mean(0), pooled.var(0, unbiased=False)
        z = (feat_BRD - mean) / (var + bn.eps).sqrt() * bn.weight + bn.bias
        outs.append(z @ linear.weight.T + linear.bias)
        if name.startswith('repvit'):
            bn, linear = part.head_dist.bn, part.head_dist.l
            z = (feat_BRD - mean) / (var + bn.eps).sqrt() * bn.weight + bn.bias
            outs.append(z @ linear.weight.T + linear.bias)
            break
    torch.testing.assert_close(logits_BRC, torch.stack(outs).mean(dim=0))


def _feature_shape(model, head):
    seen = []
    hooked(model.eval(), head.name, lambda m, args, out: seen.append(out), torch.randn(1, 3, 224, 224).double())
    model.train()
    return seen[0].shape[1:]


@pytest.mark.parametrize('name,mix', [
    ('levit_128s', 'multimix'), ('levit_128s', 'densemultimix'), ('repvit_m0_9', 'densemultimix'),
    ('test_resnet', 'multimix'), ('test_resnet', 'densemultimix'),
])
def test_running_statistics_are_those_of_a_clean_step(name, mix):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).train()
    size = model.pretrained_cfg['input_size'][-1]
    task = MixTask(model, mix, dict(prob=1.0, n=32), verbose=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.randn(6, 3, size, size), torch.arange(6) % 5
    with torch.no_grad():
        model(x)
    clean = {k: v.clone() for k, v in model.state_dict().items() if 'running' in k or 'num_batches' in k}
    model.load_state_dict(before)
    task(x, y)['loss'].backward()
    assert clean and all(torch.equal(model.state_dict()[k], v) for k, v in clean.items())
    assert any(not torch.equal(before[k], v) for k, v in clean.items())


def test_dropout_in_the_head_has_one_mask_per_example():
    model = timm.create_model('test_resnet', num_classes=5, drop_rate=0.5).train()
    head = Anatomy(model).dense_head()
    feature_map = torch.ones(4, model.num_features, 5, 5)
    torch.manual_seed(0)
    _, embed_BDR = head(feature_map)
    assert torch.equal(embed_BDR, embed_BDR[:, :, :1].expand_as(embed_BDR))
    assert set(embed_BDR.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(embed_BDR[0], embed_BDR[1])


def test_functional_dropout_is_off_in_eval():
    model = timm.create_model('test_resnet', num_classes=5, drop_rate=0.5).eval()
    _, embed_BDR = Anatomy(model).dense_head()(torch.ones(2, model.num_features, 3, 3))
    assert torch.equal(embed_BDR, torch.ones_like(embed_BDR))


@pytest.mark.parametrize('name,options,mix,reason', [
    ('vit_tiny_patch16_224', {}, 'densemultimix', r"vit_tiny_patch16_224.*'avg', class_token=False, fc_norm=False"),
    ('vgg11', {}, 'densemultimix', 'vgg11.*multimix'),
    ('test_resnet', dict(align_at='layer9'), 'alignmix', "layer9' does not exist; its stages are layer1"),
    ('test_resnet', dict(align_at='layer3.0.conv1'), 'alignmix', 'do.* not determine the logits alone'),
    ('test_resnet', dict(align_at=17), 'alignmix', 'has 4 stages'),
    ('test_resnet', dict(mix_at='fc'), 'multimix', 'not a feature map'),
])
def test_refused_by_name_with_the_reason(name, options, mix, reason):
    model = timm.create_model(name, num_classes=3)
    with pytest.raises(UnsupportedModel, match=reason):
        MixTask(model, mix, options, verbose=False)


def test_no_classifier_and_wrong_size_are_refused():
    with pytest.raises(UnsupportedModel, match='num_classes=0'):
        Anatomy(timm.create_model('test_resnet', num_classes=0))
    with pytest.raises(UnsupportedModel, match='levit_128s does not run on 300x300.*img_size'):
        Anatomy(timm.create_model('levit_128s'), img_size=300)


def test_model_whose_output_is_not_linear_is_refused():
    class Squashed(torch.nn.Module):
        num_classes, pretrained_cfg, feature_info = 3, dict(architecture='squashed', input_size=(3, 8, 8)), []

        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(3, 3)

        def forward(self, x):
            return F.tanh(self.fc(x.mean((2, 3))))

    with pytest.raises(UnsupportedModel, match='squashed: the logits are not the output of linear layers'):
        MixTask(Squashed(), 'multimix', verbose=False)


def test_other_image_sizes_after_construction():
    model = timm.create_model('test_resnet', num_classes=3).train()
    task = MixTask(model, 'densemultimix', dict(prob=1.0, n=4), verbose=False)
    for size in (96, 128):
        assert task(torch.randn(2, 3, size, size), torch.tensor([0, 1]))['loss'].isfinite()
        assert model.training and all(module.training for module in model.modules())


def test_examining_leaves_the_model_alone():
    model = timm.create_model('levit_128s', num_classes=3).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    anatomy = Anatomy(model)
    anatomy.dense_head(), anatomy.align_layer()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules()) and model.training


@pytest.mark.parametrize('mix', ['alignmix', 'densemultimix'])
def test_half_precision_models(mix):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3).to(torch.bfloat16).train()
    options = dict(prob=1.0, n=4) if mix == 'densemultimix' else dict(mode_probs=(0, 1, 1))
    result = MixTask(model, mix, options, verbose=False)(torch.randn(2, 3, 64, 64).bfloat16(), torch.tensor([0, 1]))
    result['loss'].backward()
    assert result['loss'].isfinite() and model.conv1[0].weight.grad.isfinite().all()


def test_dense_model_kwargs():
    assert dense_model_kwargs('vit_small_patch16_224') == DENSE_VIT
    assert dense_model_kwargs('resnet50') == {} == dense_model_kwargs('levit_128s')
    assert dense_model_kwargs('deit_small_distilled_patch16_224') == {}


def test_allow_class_token():
    model = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=3, img_size=64)
    head = Anatomy(model).dense_head(allow_class_token=True)
    assert head.name == 'norm' and head.layout.prefix == 2 and not head.exact_mean
    feature_map = torch.randn(2, 18, model.num_features)
    expected = (model.head(feature_map[:, 2:]) + model.head_dist(feature_map[:, 2:])) / 2
    torch.testing.assert_close(head(feature_map)[0], expected)


@pytest.mark.parametrize('name', ('legacy_xception', 'xception41'))
def test_an_untrained_network_does_not_hide_features_that_by_pass(name):
    """Its logits hardly depend on the image, so a layer beside a shortcut seemed to decide them."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    with pytest.raises(UnsupportedModel, match='features by-pass it'):
        MixTask(model, mix='alignmix', img_size=128)
