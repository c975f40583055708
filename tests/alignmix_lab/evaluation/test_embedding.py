"""Alignment and uniformity against a float64 loop and by hand, the embeddings themselves, the map and its absence."""
import math
import sys

import numpy as np
import pytest
import timm
import torch

from alignmix_lab.evaluation.protocols import embedding
from alignmix_lab.evaluation.protocols.embedding import ClassifierInput, alignment, choose, uniformity

MEAN, STD = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.25, 0.3]]).view(2, 1, 3, 1, 1)  # of the shared models


def by_loop(embed, labels, power, t, normalize):
    """Both numbers pair by pair."""
    rows = embed.double().tolist()
    if normalize:
        rows = [[x / math.hypot(*row) for x in row] for row in rows]
    distances, kernels = [], []
    for i in range(len(rows)):
        for j in range(i):
            distance = math.dist(rows[i], rows[j])
            kernels.append(math.exp(-t * distance ** 2))
            if labels[i] == labels[j]:
                distances.append(distance ** power)
    return sum(distances) / len(distances), math.log(sum(kernels) / len(kernels))


@pytest.mark.parametrize('power, t, normalize', [(1.0, 2.0, True), (2.0, 0.5, True), (1.0, 0.1, False)])
def test_against_a_loop(monkeypatch, power, t, normalize):
    monkeypatch.setattr(embedding, 'CHUNK', 7)  # pairs within and across chunks
    embed, labels = torch.randn(40, 5), torch.randint(0, 3, (40,))
    expected = by_loop(embed, labels.tolist(), power, t, normalize)
    assert alignment(embed, labels, power, normalize) == pytest.approx(expected[0], abs=1e-10)
    assert uniformity(embed, t, normalize) == pytest.approx(expected[1], abs=1e-10)


def test_by_hand():
    """Class 0 at 3 and 4 o'clock of a right angle, class 1 opposite: distances sqrt(2) and 0."""
    embed = torch.tensor([[2., 0.], [0., 5.], [-1., 0.], [-3., 0.]])
    labels = torch.tensor([0, 0, 1, 1])
    assert alignment(embed, labels) == pytest.approx(math.sqrt(2) / 2)
    # Squared distances of the six pairs: 2, 4, 4, 2, 2, 0.
    assert uniformity(embed) == pytest.approx(math.log((3 * math.exp(-4) + 2 * math.exp(-8) + 1) / 6))
    assert alignment(embed, labels, normalize=False) == pytest.approx((math.sqrt(29) + 2) / 2)


def test_far_embeddings_do_not_underflow():
    embed = torch.tensor([[0., 0.], [100., 0.]])
    assert uniformity(embed, normalize=False) == pytest.approx(-20000)


def test_nothing_to_compare():
    with pytest.raises(ValueError, match='no class has two images among 3'):
        alignment(torch.randn(3, 2), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match='two images, got 1'):
        uniformity(torch.randn(1, 2))


@pytest.mark.parametrize('name', ['test_resnet', 'levit_128s'])
def test_embeddings_are_what_the_classifier_sees(name):
    size = 160 if name == 'test_resnet' else 224
    model = timm.create_model(name, num_classes=4).eval()
    with torch.no_grad(), ClassifierInput(model, (size, size)) as tap:
        logits = model(torch.randn(2, 3, size, size))
        embed = tap.take()
        if name == 'levit_128s':  # two classifiers, of which timm's model returns the mean
            heads = [model.head.linear, model.head_dist.linear]
        else:
            heads = [model.get_classifier()]
        parts = embed.chunk(len(heads), dim=1)
        mean = torch.stack([head(part) for head, part in zip(heads, parts, strict=True)]).mean(0)
    torch.testing.assert_close(mean, logits)
    assert not model.get_classifier()._forward_pre_hooks if name == 'test_resnet' else True


def test_choice_of_images_for_the_map():
    labels = np.array([5, 3, 3, 9, 5, 3])
    assert choose(labels, 2, 10, seed=0).tolist() == [0, 1, 2, 4, 5]  # classes 3 and 5
    some = choose(labels, 2, 3, seed=0)
    assert len(some) == 3 and (np.diff(some) > 0).all() and 3 not in some
    assert some.tolist() == choose(labels, 2, 3, seed=0).tolist()


class Fake:
    """What draw_maps needs of an evaluation."""


def test_without_umap_there_is_no_map(monkeypatch):
    monkeypatch.setitem(sys.modules, 'umap', None)
    assert embedding.draw_maps(Fake(), {'a': (np.zeros((2, 2)), np.zeros(2))}) is None


def test_a_whole_run(run, networks, pixels, monkeypatch):
    """Against the loop over embeddings of the network itself; where umap-learn is missing the page says so."""
    monkeypatch.setitem(sys.modules, 'umap', None)
    found = run('embedding')
    images = (torch.from_numpy(pixels[0]).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    for row, network in zip(found['rows'], networks, strict=True):
        with torch.no_grad():
            embed = network.float().forward_head(network.float().forward_features(images), pre_logits=True)
        expected = by_loop(embed, pixels[1].tolist(), 1.0, 2.0, True)
        assert (row['alignment'], row['uniformity']) == (
            pytest.approx(expected[0], rel=1e-4), pytest.approx(expected[1], rel=1e-4))
    assert embedding.NO_UMAP in found['notes'] and found['pictures'] == []
