"""SnapMix by hand: maps, boxes and weights from the network's own features and classifier."""
import pytest
import timm
import torch
import torch.nn.functional as F
from scipy import stats

from timm_alignmix import MixTask, UnsupportedModel, attach, create_mixup
from timm_alignmix.step_random import StepRandom


def tiny(name='test_resnet', dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs).to(dtype).train()


def batch(B=4, H=64, W=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, H, W, generator=generator, dtype=torch.float64), torch.arange(B) % 3


def task_of(model=None, **options):
    return MixTask(model or tiny(), 'snapmix', options, img_size=64, verbose=False)


def bilinear(x, H, W, corners):
    """Bilinear interpolation of (h, w) by its definition."""
    h, w = x.shape
    out = torch.zeros(H, W, dtype=torch.float64)
    for i in range(H):
        for j in range(W):
            if corners:
                u, v = i * (h - 1) / max(H - 1, 1), j * (w - 1) / max(W - 1, 1)
            else:
                u, v = max((i + 0.5) * h / H - 0.5, 0), max((j + 0.5) * w / W - 0.5, 0)
            a, b = min(int(u), h - 1), min(int(v), w - 1)
            c, d = min(a + 1, h - 1), min(b + 1, w - 1)
            s, t = u - a, v - b
            out[i, j] = (1 - s) * ((1 - t) * x[a, b] + t * x[a, d]) + s * ((1 - t) * x[c, b] + t * x[c, d])
    return out


def maps_of(model, images, y):
    with torch.no_grad():
        features = model.eval().forward_features(images)
    maps = []
    for feature, label in zip(features, y.tolist(), strict=True):
        cam = (feature * model.fc.weight[label].detach().view(-1, 1, 1)).sum(dim=0)
        cam = bilinear(cam, *images.shape[2:], corners=False)
        cam = cam - cam.min()
        maps.append(cam / cam.sum())
    return torch.stack(maps)


@pytest.mark.parametrize('H, W', [(64, 64), (33, 64)])
def test_step_by_hand(H, W):
    images, y = batch(H=H, W=W)
    task = task_of()
    draw = task.mix.draw(images, StepRandom(0).at(0, images.device))
    perm, (t, left, b, right), (T, L, B, R) = draw['perm'], draw['box'], draw['source']
    assert (b - t, right - left) != (B - T, R - L)
    maps, mixed, weights = maps_of(tiny(), images, y), images.clone(), []
    for i, j in enumerate(perm.tolist()):
        for c in range(3):
            mixed[i, c, t:b, left:right] = bilinear(images[j, c, T:B, L:R], b - t, right - left, corners=True)
        own, other = 1 - maps[i, t:b, left:right].sum(), maps[j, T:B, L:R].sum()
        weights.append([own + other, own + other] if y[i] == y[j] else [own, other])
    weights = torch.tensor(weights, dtype=torch.float64)
    assert (y == y[perm]).any() and not (y == y[perm]).all()
    output = tiny()(mixed)
    target = weights[:, :1] * F.one_hot(y, 5) + weights[:, 1:] * F.one_hot(y[perm], 5)
    expected = -(target * output.log_softmax(dim=1)).sum(dim=1).mean()
    model = task.trainable_module.model
    result = task(images, y)
    torch.testing.assert_close(result['loss'], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result['lam'], weights[:, 0], rtol=1e-9, atol=1e-9)
    hits = (target / weights.sum(dim=1, keepdim=True)).gather(1, output.argmax(dim=1, keepdim=True))
    torch.testing.assert_close(result['accuracy'].double(), hits.mean(), rtol=0, atol=1e-6)
    assert model.bn1.num_batches_tracked == 1  # the pass over the clean images moves no statistics
    rows = F.one_hot(y, 5).double()
    torch.testing.assert_close(task_of()(images, rows)['loss'], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name, kwargs', [
    ('test_vit', dict(global_pool='avg', class_token=False, fc_norm=False)), ('test_convnext', {}), ('levit_128s', {}),
])
def test_maps_of_other_heads_rank_positions_as_their_dense_logits(name, kwargs):
    """The bias is the same at all positions, so the map is the dense logit of the own class up to scale."""
    model = tiny(name, **kwargs)
    images, y = batch(B=2, H=(side := 224 if name == 'levit_128s' else 160), W=side)
    mix = MixTask(model, 'snapmix', img_size=side, verbose=False).mix
    feature_map = mix.head.feature_map(images)
    feature_map = feature_map + torch.randn_like(feature_map)  # an untrained LeViT's positions are all equal
    model.eval()
    maps = mix.activation(images, feature_map, y)
    logits_BRC, _ = mix.head(feature_map)
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(2, dtype=torch.float64))
    grid = int(logits_BRC.shape[1] ** 0.5)
    for i in range(2):
        cam = logits_BRC[i, :, y[i]].detach().view(1, 1, grid, grid)
        cam = F.interpolate(cam, (side, side), mode='bilinear')[0, 0]
        cam = cam - cam.min()
        torch.testing.assert_close(maps[i].detach(), cam / cam.sum(), rtol=1e-4, atol=1e-9)


def test_identities(monkeypatch):
    images, y = batch(B=3)
    mix = task_of().mix
    uniform = torch.full((3, 64, 64), 1 / 64 ** 2, dtype=torch.float64)
    monkeypatch.setattr(mix, 'activation', lambda *args: uniform)
    draw = mix.draw(images, StepRandom(0).at(0, images.device))
    draw['perm'] = torch.tensor([1, 2, 0])
    whole, none = [0, 0, 64, 64], [0, 0, 0, 0]
    full = mix.complete(images, dict(draw, box=whole, source=whole), None, y)
    torch.testing.assert_close(mix.images(images, full), images[draw['perm']])
    torch.testing.assert_close(full['lam'], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(full['partner_lam'], torch.ones(3, dtype=torch.float64))
    empty = mix.complete(images, dict(draw, box=none, source=none), None, y)
    rows = F.one_hot(y, 5).double()
    assert torch.equal(mix.images(images, empty), images) and torch.equal(mix.target(rows, empty), rows)
    part = mix.complete(images, dict(draw, box=[0, 0, 32, 64], source=[0, 0, 16, 16]), None, y)
    torch.testing.assert_close(part['lam'], torch.full((3,), 0.5, dtype=torch.float64))  # uniform maps give areas
    torch.testing.assert_close(part['partner_lam'], torch.full((3,), 1 / 16, dtype=torch.float64))
    accuracy = mix.mass(rows, y, part)  # each predicts the example's class: its share of both weights
    torch.testing.assert_close(accuracy.double(), torch.full((3,), 0.5 / (0.5 + 1 / 16), dtype=torch.float64))
    equal = torch.ones_like(images)
    torch.testing.assert_close(mix.images(equal, part), equal)


@pytest.mark.parametrize('name, side', [('test_resnet', 64), ('levit_128s', 224)])
def test_maps_are_those_of_evaluation(name, side):
    """Neither dropout nor the statistics of the batch, in the network or in its head, and no global random number."""
    images, y = batch(B=2, H=side, W=side)
    tasks = [MixTask(tiny(name, **kwargs), 'snapmix', img_size=side, verbose=False) for kwargs in (
        dict(drop_rate=0.5), dict(drop_rate=0.0))]
    tasks[1].trainable_module.eval()
    state = torch.get_rng_state()
    lams = []
    for task in tasks:
        draw = task.mix.draw(images, StepRandom(0).at(0, images.device))
        lams.append(task.trainable_module.complete(images, y, draw)['lam'])
    assert torch.equal(*lams) and torch.equal(torch.get_rng_state(), state)
    assert tasks[0].trainable_module.model.training and not lams[0].requires_grad


def test_a_map_of_one_value_counts_as_area():
    images, y = batch(B=2)
    mix = task_of().mix
    maps = mix.activation(images, torch.ones_like(mix.head.feature_map(images)), y)
    torch.testing.assert_close(maps, torch.full_like(maps, 1 / 64 ** 2))


def test_boxes_are_two_and_of_beta_areas():
    images, mix = batch(B=2)[0], task_of().mix
    draws = [mix.draw(images, StepRandom(0).at(step, images.device)) for step in range(300)]
    assert all(torch.equal(draw['mask'][0, 0], outside(draw['box'])) for draw in draws)
    for key in ('box', 'source'):
        inner = [box for draw in draws if (box := draw[key])[0] > 0 and box[1] > 0 and box[2] < 64 and box[3] < 64]
        side = torch.tensor([box[2] - box[0] for box in inner], dtype=torch.float64)
        assert len(inner) > 10 and ((side / 64) ** 2).min() > 0.02
    lams = [1 - (s := draw['source'])[2] + s[0] for draw in draws]
    boxes = [1 - (s := draw['box'])[2] + s[0] for draw in draws]
    assert stats.ks_2samp(lams, boxes).pvalue > 1e-3  # one law for both, drawn apart
    assert abs(torch.corrcoef(torch.tensor([lams, boxes]).double())[0, 1]) < 0.25
    assert len({tuple(draw['box']) for draw in draws}) > 200


def outside(box):
    mask = torch.ones(64, 64, dtype=torch.bool)
    mask[box[0]:box[2], box[1]:box[3]] = False
    return mask


def test_clean_steps_mixup_function_and_refusals():
    images, y = batch()
    task = task_of(prob=0.3)
    modes = [task.mix.draw(images, StepRandom(0).at(step, images.device))['mode'] for step in range(200)]
    assert set(modes) == {'clean', 'input'} and abs(modes.count('input') / 200 - 0.3) < 0.17
    expected = task_of()(images, y)
    model = tiny()
    x, target = create_mixup('snapmix', model, img_size=64)(images, y)
    loss = F.cross_entropy(model(x), target.double())
    torch.testing.assert_close(loss, expected['loss'], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="'snapmix' looks at the clean images and their labels"):
        attach(tiny(), 'snapmix', img_size=64)
    with pytest.raises(UnsupportedModel, match='test_vit classifies its class token'):
        MixTask(tiny('test_vit'), 'snapmix', verbose=False)


def test_bf16_checkpointing_and_compilation():
    images, y = (x.float() if x.is_floating_point() else x for x in batch())
    exact = task_of(tiny(dtype=torch.float32))(images, y)
    with torch.autocast('cpu', torch.bfloat16):
        rough = task_of(tiny(dtype=torch.float32))(images, y)
    assert rough['loss'].dtype == rough['lam'].dtype == torch.float32
    torch.testing.assert_close(rough['lam'], exact['lam'], rtol=0, atol=0.02)
    torch.testing.assert_close(rough['loss'], exact['loss'], rtol=0.05, atol=0.05)
    model = tiny(dtype=torch.float32)
    model.set_grad_checkpointing()
    assert torch.equal(task_of(model)(images, y)['lam'], exact['lam'])
    torch._dynamo.reset()
    task = task_of(tiny(dtype=torch.float32))
    task.compile(backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(task(images, y)['loss'], exact['loss'])
