"""TokenMix: its masks by the published loop, written apart, its weights by loops, and the pass over clean images."""
import math
import random as host_random

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import stats

from timm_alignmix import MixTask, UnsupportedModel, attach, create_mix, create_mixup
from timm_alignmix.mixes.tokenmix import draw_patches
from timm_alignmix.step_random import StepRandom


def tiny(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_vit', num_classes=5, **kwargs).double().train()


def batch(B=3, H=160, W=160):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, H, W, generator=generator, dtype=torch.float64), torch.arange(B) % 5


def task_of(model=None, prob=1.0, criterion=None, **options):
    return MixTask(model or tiny(), 'tokenmix', dict(prob=prob, **options), criterion=criterion, verbose=False)


def published_count(rng, rows, columns):
    """Number of patches that the published loop pastes, in plain Python."""
    wanted = min(rows * columns, rows * columns // 2 + 14)
    grid = [[0] * columns for _ in range(rows)]
    count = 0
    while count < wanted:
        delta = 0
        for _ in range(10):
            area = rng.uniform(1, wanted - count)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
            if w < columns and h < rows:
                top, left = rng.randint(0, rows - h), rng.randint(0, columns - w)
                cells = [(i, j) for i in range(top, top + h) for j in range(left, left + w)]
                new = [cell for cell in cells if not grid[cell[0]][cell[1]]]
                if 0 < len(new) <= wanted - count:
                    for i, j in new:
                        grid[i][j] = 1
                    delta = len(new)
            if delta:
                break
        if not delta:
            break
        count += delta
    down = sum(grid[i][j] != grid[i + 1][j] for i in range(rows - 1) for j in range(columns))
    along = sum(grid[i][j] != grid[i][j + 1] for i in range(rows) for j in range(columns - 1))
    return count, sum(grid[0]), sum(grid[rows // 2]), down, along


@pytest.mark.parametrize('rows, columns', [(14, 14), (10, 16), (3, 3)])
def test_masks_have_the_law_of_the_published_loop(rows, columns):
    """Numbers of patches, in all, in the first row and in the middle one, and of changes down and along the rows."""
    generator, rng = torch.Generator().manual_seed(3), host_random.Random(4)
    ours = [draw_patches(rows, columns, False, generator) for _ in range(400)]
    theirs = [published_count(rng, rows, columns) for _ in range(400)]
    wanted = min(rows * columns, rows * columns // 2 + 14)
    for k, count in enumerate((
            lambda m: m.sum(), lambda m: m[0].sum(), lambda m: m[rows // 2].sum(),
            lambda m: m[1:].logical_xor(m[:-1]).sum(), lambda m: m[:, 1:].logical_xor(m[:, :-1]).sum())):
        found = [int(count(mask)) for mask in ours]
        assert max(found) <= wanted
        assert stats.ks_2samp(found, [each[k] for each in theirs]).pvalue > 1e-3
    scattered = [draw_patches(rows, columns, True, generator) for _ in range(300)]
    assert {int(mask.sum()) for mask in scattered} == {wanted}
    often = torch.stack(scattered).double().mean(dim=0)
    share = wanted / (rows * columns)
    assert (often - share).abs().max() <= 5 * math.sqrt(share * (1 - share) / 300) + 1e-12


def shares_by_loops(score, mask, perm, patch=16):
    """Weight of the example and of its partner, from a map (B, R) and a mask of pixels (H, W)."""
    columns = mask.shape[1] // patch
    weights = []
    for b, partner in enumerate(perm.tolist()):
        own, other = score[b] / score[b].sum(), score[partner] / score[partner].sum()
        kept = [bool(mask[r // columns * patch, r % columns * patch]) for r in range(len(own))]
        weights.append((
            sum(q for q, is_kept in zip(own.tolist(), kept, strict=True) if is_kept),
            sum(q for q, is_kept in zip(other.tolist(), kept, strict=True) if not is_kept)))
    return torch.tensor(weights, dtype=torch.float64)


def attention_of(model, images):
    seen, layer = [], model.blocks[-1].attn
    layer.fused_attn = False
    layer.attn_drop.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(images)
    return seen[0][:, :, 0, 1:].mean(dim=1)


@pytest.mark.parametrize('scores', ['attention', 'callable'])
@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('B, H, W', [(3, 160, 160), (2, 96, 160)])
def test_step_by_hand(B, H, W, normalize, scores):
    images, y = batch(B, H, W)
    score = attention_of(tiny(drop_path_rate=0.5), images)
    if scores == 'callable':
        score = torch.rand(B, H * W // 256, dtype=torch.float64)
    given = 'attention' if scores == 'attention' else lambda x, target: score if target is y and x is images else None
    task = task_of(tiny(drop_path_rate=0.5), scores=given, normalize=normalize, criterion=nn.BCEWithLogitsLoss())
    draw = task.mix.draw(images, StepRandom(0).at(0, images.device))
    mask, perm = draw['mask'][0, 0], draw['perm']
    mixed = torch.where(mask, images, images[perm])
    weights = shares_by_loops(score, mask, perm)
    if normalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    target = weights[:, :1] * F.one_hot(y, 5) + weights[:, 1:] * F.one_hot(y[perm], 5)
    torch.manual_seed(5)
    output = tiny_again(drop_path_rate=0.5)(mixed)
    expected = F.binary_cross_entropy_with_logits(output, target)
    torch.manual_seed(5)
    result = task(images, y)
    torch.testing.assert_close(result['loss'], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result['lam'].double(), weights[:, 0], rtol=0, atol=1e-6)
    assert result['mode'] == 'tokens' and (0 < mask.double().mean() < 1)
    hits = (target / weights.sum(dim=1, keepdim=True)).gather(1, output.argmax(dim=1, keepdim=True))
    torch.testing.assert_close(result['accuracy'].double(), hits.mean(), rtol=0, atol=1e-6)
    # Patches are whole.
    patches = mask.unfold(0, 16, 16).unfold(1, 16, 16).flatten(2)
    assert torch.equal(patches.all(dim=2), patches.any(dim=2))


def tiny_again(**kwargs):
    state = torch.get_rng_state()
    model = tiny(**kwargs)
    torch.set_rng_state(state)
    return model


def test_identities():
    images, y = batch()
    mix = task_of(scores=lambda x, target: torch.full((3, 100), 0.2)).mix
    draw = mix.draw(images, StepRandom(0).at(0, images.device))
    done = mix.complete(images, draw, None, y)
    area = draw['mask'].double().mean().float()
    torch.testing.assert_close(done['lam'], area.expand(3))  # uniform scores give the area
    torch.testing.assert_close(done['partner_lam'], (1 - area).expand(3))
    zero = mix.complete(images, dict(draw, pasted=torch.zeros(100, dtype=torch.bool)), None, y)
    assert torch.equal(zero['lam'], torch.ones(3)) and torch.equal(zero['partner_lam'], torch.zeros(3))
    by_area = task_of(scores='area').mix
    same = by_area.draw(images, StepRandom(0).at(0, images.device))
    assert torch.equal(same['mask'], draw['mask']) and 'partner_lam' not in same
    torch.testing.assert_close(same['lam'], area)
    blank = task_of(scores=lambda x, target: torch.zeros(3, 100)).mix
    torch.testing.assert_close(blank.complete(images, draw, None, y)['lam'], area.expand(3))
    # A pair of one class has all of its weight there; equal images stay as they are.
    rows = mix.target(F.one_hot(torch.tensor([2, 2, 2]), 5).double(), done)
    torch.testing.assert_close(rows, F.one_hot(torch.tensor([2, 2, 2]), 5).double())
    equal = images[:1].expand(3, -1, -1, -1)
    assert torch.equal(mix.images(equal, done), equal)


def test_other_steps_are_input_mixup_and_how_often():
    images, y = batch(2, 64, 64)
    mix = task_of(prob=0.5).mix
    draws = [mix.draw(images, StepRandom(0).at(step, images.device)) for step in range(400)]
    modes = [mix.mode_name(draw) for draw in draws]
    assert abs(modes.count('tokens') / 400 - 0.5) < 5 * math.sqrt(0.25 / 400) and set(modes) == {'tokens', 'input'}
    draw = draws[modes.index('input')]
    lam, perm = draw['lam'].double(), draw['perm']
    torch.testing.assert_close(mix.images(images, draw), lam * images + (1 - lam) * images[perm])
    rows = F.one_hot(y, 5).double()
    torch.testing.assert_close(mix.target(rows, draw), lam * rows + (1 - lam) * rows[perm])


def test_the_pass_leaves_no_trace_and_takes_no_gradient():
    images, y = batch()
    model = tiny(drop_rate=0.3)
    model.blocks[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    task = task_of(model)
    module, rng = task.trainable_module, torch.get_rng_state()
    draw = module.complete(images, y, task.mix.draw(images, StepRandom(0).at(0, images.device)))
    assert {name: module.training for name, module in model.named_modules()} == modes and not modes['blocks.0']
    assert torch.equal(torch.get_rng_state(), rng) and not draw['lam'].requires_grad and 'clean_pass' not in draw
    assert module.step.draw is None and module.step.output is None
    assert all(p.grad is None for p in model.parameters())


def test_mixup_function_and_refusals():
    images, y = batch()
    expected = task_of()(images, y)
    model = tiny()
    mixup_fn = create_mixup('tokenmix', model, prob=1.0)
    x, target = mixup_fn(images, y)
    torch.testing.assert_close(F.cross_entropy(model(x), target.double()), expected['loss'], rtol=1e-6, atol=1e-6)
    assert mixup_fn.mode == 'tokens' and not torch.allclose(target.sum(dim=1), torch.ones(3))
    with pytest.raises(ValueError, match="'tokenmix' looks at the clean images and their labels before the step"):
        attach(tiny(), 'tokenmix')
    attached = attach(other := tiny(), 'tokenmix', dict(scores='area', prob=1.0))
    assert torch.equal(attached.loss(other(images), y), task_of(scores='area')(images, y)['loss'])
    with pytest.raises(ValueError, match='weights that do not sum to 1'):
        create_mixup('tokenmix', tiny(), targets='pairs')
    averaged = tiny(global_pool='avg')
    with pytest.raises(UnsupportedModel, match='does not classify a class token'):
        task_of(averaged)
    assert task_of(averaged, scores='area')(images, y)['loss'].isfinite()
    with pytest.raises(UnsupportedModel, match='test_resnet does not divide images into patches'):
        MixTask(timm.create_model('test_resnet', num_classes=5), 'tokenmix', dict(scores='area'), verbose=False)
    with pytest.raises(ValueError, match=r'scores of 100 patches of each image, \(3, 100\), got \(3, 10\)'):
        task_of(scores=lambda x, target: torch.ones(3, 10))(images, y)
    mix = task_of().mix
    with pytest.raises(RuntimeError, match="'tokenmix' looks at the clean batch before it mixes"):
        mix.images(images, mix.draw(images, StepRandom(0).at(0, images.device)))
    with pytest.raises(ValueError, match="scores must be 'attention', 'area' or a callable"):
        create_mix('tokenmix', scores='cam')


def test_inputs_are_checked_and_mixed_targets_are_not():
    images, _ = batch()
    task = task_of()
    with pytest.raises(ValueError, match='probabilities that sum to 1'):
        task(images, torch.full((3, 5), 0.5))
    loss = task_of()(images, torch.full((3, 5), 0.2))['loss']
    assert loss.isfinite()


def test_bf16_checkpointing_and_compilation():
    images, y = (x.float() if x.is_floating_point() else x for x in batch())
    exact = task_of(tiny().float())(images, y)
    with torch.autocast('cpu', torch.bfloat16):
        rough = task_of(tiny().float())(images, y)
    assert rough['loss'].dtype == rough['lam'].dtype == torch.float32
    torch.testing.assert_close(rough['lam'], exact['lam'], rtol=0, atol=0.01)
    torch.testing.assert_close(rough['loss'], exact['loss'], rtol=0.05, atol=0.02)
    model = tiny().float()
    model.set_grad_checkpointing()
    assert torch.equal(task_of(model)(images, y)['lam'], exact['lam'])
    torch._dynamo.reset()
    task = task_of(tiny().float())
    task.compile(backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(task(images, y)['loss'], exact['loss'])
