"""Distances by hand, mixed embeddings against mixing by hand, 'undefined', and wrong input."""
import pytest
import timm
import torch

import timm_alignmix
from alignmix_lab.evaluation.protocols import intrusion
from alignmix_lab.evaluation.protocols.embedding import ClassifierInput
from alignmix_lab.evaluation.protocols.intrusion import Bank, mix_embeddings, nearest_other_class, summarize
from timm_alignmix.mix_module import MixModule
from timm_alignmix.mixes.base import weighed
from timm_alignmix.step_random import StepRandom

MEAN, STD = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.25, 0.3]]).view(2, 1, 3, 1, 1)  # of the shared models


def test_by_hand(monkeypatch):
    monkeypatch.setattr(intrusion, 'CHUNK', 2)  # the nearest may be in any chunk
    bank = Bank(torch.tensor([[0., 0.], [4., 0.], [0., 3.], [9., 9.], [1., 0.]]), torch.tensor([0, 1, 2, 2, 0]))
    embed = torch.tensor([[1., 0.], [1., 0.], [0., 2.]])
    mixed = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    found = nearest_other_class(embed, mixed, bank)
    # (1, 0) holds classes 0 and 1: the nearest of class 2 is (0, 3); without class 1 it is (4, 0).
    assert found.tolist() == [10, 9, float('inf')]
    assert bank.squared_norm == pytest.approx((0 + 16 + 9 + 162 + 1) / 5)


def test_undefined_is_never_infinite_nor_the_mean_of_the_rest():
    assert summarize(torch.tensor([1., 3.])) == intrusion.Intrusion(2.0, 0.0, 2)
    assert summarize(torch.tensor([1., torch.inf, 3., 2.])) == intrusion.Intrusion(None, 0.25, 4)


SIDE, B = 64, 6


@pytest.fixture(scope='module')
def network():
    torch.manual_seed(0)
    return timm.create_model('test_resnet', num_classes=4).eval()


@pytest.mark.parametrize('name', sorted(set(timm_alignmix.list_mixes()) - {'alignmix_ae'}))
def test_mixed_embeddings_give_the_logits_that_are_trained(network, name):
    """The classifier on mixed embeddings must be the rows of the method's own loss, for every mode."""
    options = {'n': 5} if 'multimix' in name else {}
    if name in ('tokenmix', 'transmix'):  # which need a class token
        network = timm.create_model('test_vit', num_classes=4).eval()
    module = MixModule(network, name, options, img_size=SIDE)
    images, target = torch.randn(B, 3, SIDE, SIDE), torch.tensor([0, 1, 2, 3, 0, 1])
    one_hot = torch.nn.functional.one_hot(target, 4).float()
    modes = getattr(module.mix, 'probs', None) or {None: 1}
    try:
        for mode in dict(modes):
            if mode:
                module.mix.probs = {mode: 1.0}
            draw = module.mix.draw(images, StepRandom(3).at(0, images.device))
            draw = module.complete(images, target, draw)
            with ClassifierInput(network, (SIDE, SIDE)) as tap:
                embed, weights = mix_embeddings(module, tap, images, target, draw)
            with torch.no_grad():
                module.arm(draw)
                output = network(module.mix.images(images, draw))
                feature_map = module.disarm()
                output = module.mix.output(output, draw)
                draw = weighed(draw, module.mix.lam(feature_map, draw))
                logits, rows = module.mix.rows(output, feature_map, target, draw, 0.0)
                torch.testing.assert_close(network.get_classifier()(embed), logits, atol=1e-4, rtol=1e-4)
            share = weights @ one_hot
            torch.testing.assert_close(share / share.sum(1, keepdim=True), rows / rows.sum(1, keepdim=True))
    finally:
        module.remove_hooks()


def test_the_autoencoder_mixes_what_its_plain_classifier_sees(network):
    module = MixModule(network, 'alignmix_ae', img_size=SIDE)
    images, target = torch.randn(B, 3, SIDE, SIDE), torch.arange(B) % 4
    try:
        with torch.no_grad():
            clean = network.forward_head(network.forward_features(images), pre_logits=True)
        for mode in ('clean', 'feat', 'feat_prime', 'embed'):
            module.mix.probs = {mode: 1.0}
            draw = module.mix.draw(images, StepRandom(3).at(0, images.device))
            with ClassifierInput(network, (SIDE, SIDE)) as tap:
                embed, weights = mix_embeddings(module, tap, images, target, draw)
            expected = clean if mode == 'clean' else draw['lam'] * clean + (1 - draw['lam']) * clean[draw['perm']]
            torch.testing.assert_close(embed, expected)
            assert weights.count_nonzero() == (B if mode == 'clean' else (1 + (draw['perm'] != torch.arange(B))).sum())
    finally:
        module.remove_hooks()


def test_options_have_the_names_of_mixes():
    for name in timm_alignmix.list_mixes():
        timm_alignmix.create_mix(name, **intrusion._options(name, 8))
    assert intrusion._options('multi_mix', 8) == {'n': 8}


def test_a_whole_run(run, networks, pixels):
    """Clean images against the nearest image of another class, by a loop over the network's own embeddings."""
    options = dict(intrusion_split='validation', intrusion_batch=5, intrusion_batches=3)
    found = run('intrusion', intrusion_mixes=['mixup', 'multimix'], **options)
    images = (torch.from_numpy(pixels[0]).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    labels = torch.from_numpy(pixels[1])
    for row, network in zip(found['rows'], networks, strict=True):
        with torch.no_grad():
            embed = network.float().forward_head(network.float().forward_features(images), pre_logits=True)
        nearest = [min((embed[i] - embed[j]).square().sum().item() for j in range(15) if labels[j] != labels[i])
                   for i in range(15)]
        assert row['none'] == pytest.approx(sum(nearest) / 15, rel=1e-3)  # three batches of five: every image once
        assert row['squared_norm'] == pytest.approx(embed.square().sum(1).mean().item(), rel=1e-4)
        assert row['mixup'] > 0
    # A batch of all 15 images holds all three classes: nothing is left to intrude on.
    options.update(intrusion_batch=15, redo=True)
    row = run('intrusion', intrusion_mixes=['multimix'], **options)['rows'][0]
    assert row['multimix'] == 'undefined' and row['none'] > 0
    with pytest.raises(ValueError, match='has 15 images, fewer than a batch to mix; pass --intrusion-batch 15'):
        run('intrusion', **dict(options, intrusion_batch=16))
