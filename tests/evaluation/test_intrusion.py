"""Distances by hand, mixed embeddings against mixing by hand, 'undefined', and wrong input."""
import pytest
import timm
import torch

import timm_alignmix
from timm_alignmix.evaluation import intrusion
from timm_alignmix.evaluation.embedding import ClassifierInput
from timm_alignmix.evaluation.intrusion import Bank, mix_embeddings, nearest_other_class, summarize
from timm_alignmix.module import MixModule
from timm_alignmix.rng import StepRandom


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


@pytest.mark.parametrize('name', timm_alignmix.list_mixes())
def test_mixed_embeddings_give_the_logits_that_are_trained(network, name):
    """The classifier on mixed embeddings must be the rows of the method's own loss, for every mode."""
    options = {'n': 5} if 'multimix' in name else {}
    module = MixModule(network, name, options, img_size=SIDE)
    images, target = torch.randn(B, 3, SIDE, SIDE), torch.tensor([0, 1, 2, 3, 0, 1])
    one_hot = torch.nn.functional.one_hot(target, 4).float()
    modes = getattr(module.mix, 'probs', None) or {None: 1}
    try:
        for mode in dict(modes):
            if mode:
                module.mix.probs = {mode: 1.0}
            draw = module.mix.draw(images, StepRandom(3).at(0, images.device))
            with ClassifierInput(network, (SIDE, SIDE)) as tap:
                embed, weights = mix_embeddings(module, tap, images, target, draw)
            with torch.no_grad():
                module.arm(draw)
                output = network(module.mix.images(images, draw))
                feature_map = module.disarm(draw)
                output = module.mix.output(output, draw)
                logits, rows = module.mix.rows(output, feature_map, target, draw, 0.0)
                torch.testing.assert_close(network.get_classifier()(embed), logits, atol=1e-4, rtol=1e-4)
            share = weights @ one_hot
            torch.testing.assert_close(share / share.sum(1, keepdim=True), rows / rows.sum(1, keepdim=True))
    finally:
        module.remove_hooks()


def test_options_have_the_names_of_mixes():
    for name in timm_alignmix.list_mixes():
        timm_alignmix.create_mix(name, **intrusion._options(name, 8))
    assert intrusion._options('multi_mix', 8) == {'n': 8}
