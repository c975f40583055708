"""Attention of the class token against what the model itself computes without a fused kernel."""
import pytest
import timm
import torch

from timm_alignmix.anatomy import Anatomy, Patch, UnsupportedModel

SMALL = dict(embed_dim=48, depth=2, num_heads=3)
TOKEN = dict(SMALL, global_pool='token')
CLASS_LAYERS = dict(embed_dim=48, depth=1, num_heads=3)
FAMILIES = {
    'vit': ('test_vit', {}, 1),
    'vit, qk_norm': ('vit_tiny_patch16_224', dict(SMALL, qk_norm=True), 1),
    'vit, registers': ('vit_tiny_patch16_224', dict(SMALL, reg_tokens=4), 5),
    'deit': ('deit_tiny_patch16_224', SMALL, 1),
    'deit distilled': ('deit_tiny_distilled_patch16_224', SMALL, 2),
    'deit3': ('deit3_small_patch16_224', SMALL, 1),
    'beit': ('beit_base_patch16_224', TOKEN, 1),
    'beit, shared bias': (
        'beit_base_patch16_224', dict(TOKEN, use_rel_pos_bias=False, use_shared_rel_pos_bias=True), 1),
    'beitv2': ('beitv2_base_patch16_224', TOKEN, 1),
    'eva02': ('eva02_tiny_patch14_224', TOKEN, 1),
    'eva': ('eva_giant_patch14_224', TOKEN, 1),
    'dinov3': ('vit_small_patch16_dinov3', TOKEN, 5),
    'rope mixed': ('vit_small_patch16_rope_mixed_224', TOKEN, 1),
    'cait': ('cait_xxs24_224', CLASS_LAYERS, 1),
    'xcit': ('xcit_nano_12_p16_224', CLASS_LAYERS, 1),
}
SIDE = {'eva02': 56, 'eva': 56}


def build(family):
    """In training mode and float64, with no parameter constant: layer scales and bias tables begin at one value."""
    name, kwargs, prefix = FAMILIES[family]
    torch.manual_seed(0)
    side = SIDE.get(family, 64)
    size = {} if family == 'xcit' else dict(img_size=side)
    model = timm.create_model(name, num_classes=5, **size, **kwargs).double().train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model, torch.randn(3, 3, side, side, dtype=torch.float64), prefix


def last_attention(model):
    return [module for module in model.modules() if hasattr(module, 'attn_drop')][-1]


def recorded(model, found, images):
    """What a hook on the watched module reads in a forward with fused attention."""
    rows = []
    handle = model.get_submodule(found.name).register_forward_hook(
        lambda module, *called: rows.append(found.read(*called)), with_kwargs=True)
    model(images)
    handle.remove()
    row, = rows
    return row


@pytest.mark.parametrize('family', FAMILIES)
def test_equal_to_the_models_own_attention(family):
    model, images, prefix = build(family)
    found = Anatomy(model, images.shape[-1]).class_attention()
    attention = last_attention(model)
    assert attention.fused_attn
    row = recorded(model, found, images)
    seen = []
    attention.fused_attn = False
    attention.attn_drop.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images)
    expected = seen[0][:, :, 0, prefix:].mean(dim=1)
    assert row.shape == (3, expected.shape[1]) and not row.requires_grad
    assert expected.std(dim=1).min() > 1e-3  # far from uniform
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-9)
    rows, columns = found.patch.grid(*images.shape[2:])
    assert rows * columns == row.shape[1]


def test_by_loops_over_heads_and_tokens():
    model, images, _ = build('vit')
    found = Anatomy(model, 64).class_attention()
    seen = []
    model.blocks[-1].attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    row = recorded(model, found, images)
    layer, x = model.blocks[-1].attn, seen[0]
    D, d = 64, 32
    for b in range(3):
        total = torch.zeros(16, dtype=torch.float64)
        for h in range(2):
            weight_q, weight_k = (layer.qkv.weight[start + h * d:start + (h + 1) * d] for start in (0, D))
            bias_q, bias_k = (layer.qkv.bias[start + h * d:start + (h + 1) * d] for start in (0, D))
            q = weight_q @ x[b, 0] + bias_q
            scores = torch.stack([q @ (weight_k @ token + bias_k) / d ** 0.5 for token in x[b]])
            total += (scores.exp() / scores.exp().sum())[1:] / 2
        torch.testing.assert_close(row[b], total, rtol=0, atol=1e-12)


def test_half_precision_is_summed_in_float32():
    model, images, _ = build('vit')
    found = Anatomy(model, 64).class_attention()
    exact = recorded(model, found, images)
    with torch.autocast('cpu', torch.bfloat16):
        rough = recorded(model.float(), found, images.float())
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.double(), exact, rtol=0.3, atol=0.02)


@pytest.mark.parametrize('name, kwargs', [
    ('test_resnet', {}), ('test_vit', dict(global_pool='avg')), ('test_vit3', {}),
    ('beit_base_patch16_224', dict(SMALL, img_size=64)), ('swin_s3_tiny_224', dict(embed_dim=24)),
])
def test_models_that_do_not_classify_a_class_token_are_refused(name, kwargs):
    model = timm.create_model(name, num_classes=5, **kwargs)
    with pytest.raises(UnsupportedModel, match=f'{name} does not classify a class token.*or mix cutmix'):
        Anatomy(model, None if name in ('test_vit3', 'swin_s3_tiny_224') else 64).class_attention()


def test_attention_of_another_form_is_refused():
    class Sharper(timm.layers.Attention):
        def forward(self, x, **kwargs):
            qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            attention = self.attn_drop((7 * qkv[0] @ qkv[1].transpose(2, 3)).softmax(dim=3))
            return self.proj((attention @ qkv[2]).transpose(1, 2).flatten(2))

    model = timm.create_model('test_vit', num_classes=5)
    model.blocks[-1].attn = Sharper(64, 2)
    with pytest.raises(UnsupportedModel, match=r'test_vit: the attention of its class token \(Sharper\)'):
        Anatomy(model, 64).class_attention()


def test_patches():
    assert Anatomy(timm.create_model('test_vit', num_classes=5), 64).patch() == (16, 16)
    assert Patch(14, 16).grid(56, 64) == (4, 4) and Patch(16, 16).grid(40, 33) == (3, 3)
    assert Patch(256 / 18, 10).grid(256, 100) == (18, 10)
    with pytest.raises(UnsupportedModel, match='test_resnet does not divide images into patches'):
        Anatomy(timm.create_model('test_resnet', num_classes=5), 64).patch()
