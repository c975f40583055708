"""FGSM and PGD against foolbox and by hand; what an attack must not depend on; a cut attack goes on."""
import numpy as np
import pytest
import torch
from torch import nn

from alignmix_lab.evaluation.models import PixelModel
from alignmix_lab.evaluation.protocols import robustness
from alignmix_lab.evaluation.protocols.noise import image_noise
from alignmix_lab.evaluation.protocols.robustness import fgsm, loss_gradient, pgd

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PGD = dict(eps=4 / 255, step=2 / 255, iterations=6)


@pytest.fixture
def network(networks):
    return PixelModel(networks[0], MEAN, STD)


@pytest.fixture
def batch(pixels):
    images, labels = pixels
    return torch.from_numpy(images[3:7]).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels[3:7])


@pytest.fixture
def foolbox():
    return pytest.importorskip('foolbox', reason='foolbox is missing: FGSM and PGD are NOT compared with it')


def test_equal_to_foolbox(foolbox, network, batch):
    """Every pixel the same, from the same random start."""
    images, labels = batch
    theirs = foolbox.PyTorchModel(network, bounds=(0, 1))
    attack = foolbox.attacks.FGSM(random_start=False)
    assert torch.equal(attack.run(theirs, images, labels, epsilon=8 / 255), fgsm(network, images, labels, 8 / 255))

    attack = foolbox.attacks.LinfPGD(abs_stepsize=PGD['step'], steps=PGD['iterations'], random_start=True)
    torch.manual_seed(3)
    expected = attack.run(theirs, images, labels, epsilon=PGD['eps'])
    torch.manual_seed(3)
    start = torch.rand(images.shape) * (2 * PGD['eps']) - PGD['eps']
    assert torch.equal(expected, pgd(network, images, labels, **PGD, start=start))
    assert (expected - images).abs().max() > 0.9 * PGD['eps']


class Linear(nn.Module):
    """Two classes; the first is the more probable the larger weight . pixels."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.tensor(weight)

    def forward(self, images):
        score = (images.flatten(1) * self.weight).sum(dim=1)
        return torch.stack([score, -score], dim=1)


def test_pgd_stays_at_the_bound_of_the_clean_image():
    """The reference is the clean image at every step: 20 steps of 0.05 from any start end exactly at the bound.

    Class 0 wants a large x1 + x2 - x3, so the attack lowers x1 and x2 and raises x3 by 0.1, clipped to [0, 1]:
    (0.50, 0.04, 0.95) -> (0.40, 0, 1). A reference that moves along would end at (0, 0, 1).
    """
    model, images = Linear([1., 1., -1.]), torch.tensor([0.50, 0.04, 0.95]).view(1, 3, 1, 1)
    for start in (None, torch.full((1, 3, 1, 1), 0.1), torch.tensor([-0.1, 0.03, 0.1]).view(1, 3, 1, 1)):
        found = pgd(model, images, torch.tensor([0]), eps=0.1, step=0.05, iterations=20, start=start)
        torch.testing.assert_close(found.flatten(), torch.tensor([0.40, 0.0, 1.0]))
    # FGSM for class 1: one step of 0.2 the other way.
    found = fgsm(model, images, torch.tensor([1]), eps=0.2)
    torch.testing.assert_close(found.flatten(), torch.tensor([0.70, 0.24, 0.75]))


def test_evaluation_mode_whatever_the_model_is_in(networks, batch):
    """In training mode batch norms would take the statistics of the attacked batch, and change their own."""
    images, labels = batch
    network = networks[1]
    plain = nn.Sequential(network)  # has a training mode, unlike PixelModel
    expected = pgd(plain.eval(), images, labels, **PGD)
    plain.train()
    network.layer1.eval()  # a mode of its own
    modes = [module.training for module in plain.modules()]
    buffers = [buffer.clone() for buffer in plain.buffers()]
    assert torch.equal(pgd(plain, images, labels, **PGD), expected)
    assert [module.training for module in plain.modules()] == modes
    assert all(torch.equal(old, new) for old, new in zip(buffers, plain.buffers(), strict=True))
    plain.eval()
    assert not PixelModel(network, MEAN, STD).train().network.training


def test_an_image_is_attacked_alike_in_any_batch(network, batch):
    """The gradient of the sum, not of the mean, and a start that belongs to the image. In float64, where no sign hangs
    on rounding."""
    images, labels = batch
    network = network.double()
    try:
        start = 2 * PGD['eps'] * (image_noise(torch.rand, (3, 32, 32), range(4), 42) - 0.5).double()
        whole = pgd(network, images.double(), labels, **PGD, start=start)
        for part in (slice(0, 1), slice(1, 4)):
            own = 2 * PGD['eps'] * (image_noise(torch.rand, (3, 32, 32), range(4)[part], 42) - 0.5).double()
            found = pgd(network, images[part].double(), labels[part], **PGD, start=own)
            torch.testing.assert_close(found, whole[part], atol=1e-12, rtol=0)
            gradient = loss_gradient(network, images[part].double(), labels[part])[0]
            expected = loss_gradient(network, images.double(), labels)[0][part]
            torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-9)
    finally:
        network.float()


def test_noise_belongs_to_seed_and_image():
    noise = image_noise(torch.rand, (3, 8, 8), [5, 2, 9], 42)
    assert torch.equal(noise[1], image_noise(torch.rand, (3, 8, 8), torch.tensor([2]), 42)[0])
    for other in (image_noise(torch.rand, (3, 8, 8), [5, 2, 9], 43), image_noise(torch.rand, (3, 8, 8), [0, 1, 3], 42)):
        assert (other != noise).float().mean() > 0.99


def test_protocol(run, networks, pixels):
    """Errors and curves of batches of 4, against the attacks themselves on all images at once."""
    found = run('robustness', fgsm_eps=4, fgsm_curve=[1, 12], pgd_eps=2, pgd_step=1, pgd_iterations=2, pgd_curve=[1])
    images = torch.from_numpy(pixels[0]).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(pixels[1])
    for row, network in zip(found['rows'], networks, strict=True):
        model = PixelModel(network, MEAN, STD)
        error = {'clean': images, **{f'fgsm_{eps}': fgsm(model, images, labels, eps / 255) for eps in (1, 4, 12)}}
        for eps in (1, 2):
            start = (2 * image_noise(torch.rand, (3, 32, 32), range(15), 42) - 1) * eps / 255
            error[f'pgd_{eps}'] = pgd(model, images, labels, eps / 255, eps / 2 / 255, 2, start)
        error = {name: 100 * (model(x).argmax(1) != labels).double().mean().item() for name, x in error.items()}
        assert {name: row[name] for name in error} == pytest.approx(error)
        assert (row['fgsm'], row['pgd'], row['images'], row['no_gradient']) == (
            row['fgsm_4'], row['pgd_2'], 15, 0)
        assert error['fgsm_12'] > error['clean']  # the attack does something
    assert found['details']['curves']['a']['pgd'] == {
        'eps': [0, 1, 2], 'error': [found['rows'][0][name] for name in ('clean', 'pgd_1', 'pgd_2')]}


def test_a_cut_attack_goes_on_where_it_was(run, models, monkeypatch, tmp_path):
    """Cut in the third of four batches: the second call attacks the images of the last two, in other batches."""
    options = dict(pgd_iterations=1, pgd_curve=[4], fgsm_curve=[8], model=[models[0]])
    whole = run('robustness', **options, output=str(tmp_path / 'whole'))
    attacked, original = [], robustness._one_pgd

    def counted(model, batch, eps, options):
        if len(attacked) == 2:
            raise KeyboardInterrupt
        attacked.append(batch.indices.tolist())
        return original(model, batch, eps, options)
    monkeypatch.setattr(robustness, '_one_pgd', counted)
    with pytest.raises(KeyboardInterrupt):
        run('robustness', **options)
    assert not (tmp_path / 'out' / 'robustness.json').exists()
    assert attacked == [[0, 1, 2, 3], [4, 5, 6, 7]]
    attacked.clear()
    monkeypatch.setattr(
        robustness, '_one_pgd', lambda *args: attacked.append(args[1].indices.tolist()) or original(*args))
    resumed = run('robustness', **options, batch_size=8)
    assert attacked == [[8, 9, 10, 11, 12, 13, 14]]
    assert resumed['rows'] == whole['rows'] and resumed['details'] == whole['details']
    assert not list((tmp_path / 'out' / '.partial').iterdir())


def test_images_without_a_gradient_are_counted(run, networks, models, monkeypatch):
    """Logits of 1e9 times the usual: the probability of the winner is 1, and no image has a gradient where it is
    right."""
    original = PixelModel.forward
    monkeypatch.setattr(PixelModel, 'forward', lambda self, x: 1e9 * original(self, x))
    found = run('robustness', pgd=False, model=[models[0]])
    row = found['rows'][0]
    assert [*found['columns']] == ['clean', 'fgsm', 'no_gradient', 'images']
    assert [*found['details']['curves'].popitem()[1]] == ['fgsm']
    assert row['no_gradient'] == round(15 * (1 - row['clean'] / 100)) > 0
    assert row['fgsm'] <= row['clean'] + 1e-9


def test_options():
    options = robustness.RobustnessOptions(fgsm_eps=8, fgsm_curve=[16, 0, 8])
    assert options.bounds('fgsm') == [8.0, 16.0]
    with pytest.raises(ValueError, match='--pgd-eps must be at least'):
        robustness.RobustnessOptions(pgd_eps=0)
    assert np.allclose(robustness.RobustnessOptions().bounds('pgd'), [1, 2, 4, 8])
