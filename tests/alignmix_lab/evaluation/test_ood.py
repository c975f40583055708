"""The measures by hand, which class is positive, the sets, and their wrong forms."""
import numpy as np
import pytest
import torch
from PIL import Image

from alignmix_lab.evaluation.protocols import ood_sets
from alignmix_lab.evaluation.protocols.ood import ood_metrics

ID, OOD = np.array([0.9, 0.8, 0.3]), np.array([0.7, 0.2])


def test_by_hand():
    found = ood_metrics(ID, OOD)
    # Of the six pairs one is the wrong way round: 0.3 < 0.7.
    assert found.auroc == pytest.approx(5 / 6)
    # From the top: in, in, out, in, out. Precision where an ID image comes: 1, 1, 3/4.
    assert found.aupr_in == pytest.approx((1 + 1 + 3 / 4) / 3)
    # From the bottom: out, in, out, in, in. Precision where an OOD image comes: 1, 2/3.
    assert found.aupr_out == pytest.approx((1 + 2 / 3) / 2)
    # From 0.8 on: TPR 2/3, TNR 1. From 0.3 on: TPR 1, TNR 1/2 (less). From 0.5 on: TPR 2/3, TNR 1/2.
    assert found.accuracy == pytest.approx(5 / 6)
    assert found.threshold == pytest.approx(0.8)
    assert found.accuracy_at == pytest.approx(7 / 12)


def test_the_positive_class_of_each_aupr():
    """A detector that knows nothing: average precision is the share of the positive class."""
    rare, many = np.full(10, 0.5), np.full(90, 0.5)
    found = ood_metrics(rare, many)
    assert (found.aupr_in, found.aupr_out, found.auroc) == pytest.approx((0.1, 0.9, 0.5))
    found = ood_metrics(many, rare)
    assert (found.aupr_in, found.aupr_out) == pytest.approx((0.9, 0.1))


def test_best_accuracy_against_all_thresholds():
    rng = np.random.default_rng(0)
    own, other = rng.beta(3, 2, 60).round(2), rng.beta(2, 2, 45).round(2)
    thresholds = np.concatenate([own, other, [np.inf]])
    expected = max(((own >= t).mean() + (other < t).mean()) / 2 for t in thresholds)
    assert ood_metrics(own, other).accuracy == pytest.approx(expected)


def test_perfect_detection():
    found = ood_metrics(np.array([0.9, 0.8]), np.array([0.1]))
    assert (found.auroc, found.aupr_in, found.aupr_out, found.accuracy, found.accuracy_at) == (1, 1, 1, 1, 1)


@pytest.mark.parametrize('own, other, message', [
    ([], [0.5], 'no ID scores'), ([0.5], [], 'no OOD scores'), ([0.5, np.nan], [0.5], '1 of 2 ID scores')])
def test_scores_of_one_kind_only(own, other, message):
    with pytest.raises(ValueError, match=message):
        ood_metrics(np.array(own), np.array(other))


def test_centre_crop():
    image = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    cropped = ood_sets.centre_crop(Image.fromarray(image), (5, 7))
    np.testing.assert_array_equal(cropped, image[2:7, 3:10].transpose(2, 0, 1))
    enlarged = ood_sets.centre_crop(Image.fromarray(np.full((4, 6, 3), 77, dtype=np.uint8)), (8, 8))
    np.testing.assert_array_equal(enlarged, np.full((3, 8, 8), 77))


@pytest.mark.parametrize('name, content, message', [
    ('missing.npz', None, 'no folder of images and no .npz or .npy file'),
    ('empty', 'folder', 'no images in the folder or below'),
    ('other.npz', {'y': np.zeros((2, 4, 4, 3), np.uint8)}, "no array 'x'; --ood-key names one of y"),
    ('float.npz', {'x': np.zeros((2, 4, 4, 3), np.float32)}, 'must be uint8 of shape'),
    ('channels.npz', {'x': np.zeros((2, 3, 8, 8), np.uint8)}, 'must be uint8 of shape'),
    ('none.npz', {'x': np.zeros((0, 4, 4, 3), np.uint8)}, 'with N > 0, got uint8'),
])
def test_sets_that_are_none(tmp_path, name, content, message):
    if content == 'folder':
        (tmp_path / name / 'within').mkdir(parents=True)
        (tmp_path / name / 'within' / 'notes.txt').touch()
    elif content is not None:
        np.savez(tmp_path / name, **content)
    with pytest.raises(ValueError, match=message):
        ood_sets.open_set(str(tmp_path / name), 'x')


def test_noise(run, models, monkeypatch, tmp_path):
    """Drawn by image and clipped; its mean and spread, alone and added."""
    seen = {}
    original = ood_sets.noise_batches

    def watched(ev, model, name):
        for batch in original(ev, model, name):
            seen.setdefault(name, []).append(batch.images)
            yield batch
    monkeypatch.setattr('alignmix_lab.evaluation.protocols.ood.noise_batches', watched)
    run('ood', model=[models[0]])
    images = {name: torch.cat(parts) for name, parts in seen.items()}
    seen.clear()
    run('ood', model=[models[0]], batch_size=7, redo=True)
    for name, own in images.items():
        assert own.shape == (15, 3, 32, 32) and own.min() >= 0 and own.max() <= 1
        assert torch.equal(torch.cat(seen[name]), own)
    uniform, gaussian = images['uniform'], images['gaussian']
    assert (uniform.mean().item(), uniform.std().item()) == pytest.approx((0.5, 12 ** -0.5), abs=0.01)
    # N(0.5, 0.5) leaves [0, 1] one standard deviation from its mean: 15.87 % on either side.
    for edge in (0, 1):
        assert (gaussian == edge).double().mean().item() == pytest.approx(0.1587, abs=0.01)
    assert (images['uniform-added'] == 1).double().mean() > 0.2


def test_protocol(run, pixels, logits, networks, tmp_path):
    """A folder and an array of the same images score alike, and as the networks themselves say."""
    np.savez(tmp_path / 'array.npz', x=255 - pixels[0])
    for index, image in enumerate(255 - pixels[0]):
        place = tmp_path / 'photos' / f'{index % 4}'
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f'{index}.png')
    sets = [str(tmp_path / 'array.npz'), str(tmp_path / 'photos')]
    found = run('ood', ood=sets, ood_noise=['uniform-added'], ood_fit='crop')
    assert [row['set'] for row in found['rows']] == 2 * ['array', 'photos', 'ID + uniform noise']
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    images = torch.from_numpy(255 - pixels[0]).permute(0, 3, 1, 2) / 255
    for place, (own, network) in enumerate(zip(logits, networks, strict=True)):
        array, photos, _ = found['rows'][3 * place:3 * place + 3]
        with torch.no_grad():
            other = network((images - mean) / std).softmax(dim=1).amax(dim=1).numpy()
        expected = ood_metrics(own.softmax(dim=1).amax(dim=1).numpy(), other)
        for key in ('auroc', 'aupr_in', 'aupr_out', 'accuracy', 'accuracy_at'):
            assert array[key] == photos[key] == pytest.approx(100 * getattr(expected, key))
        assert (array['id_images'], photos['ood_images']) == (15, 15)
    with pytest.raises(ValueError, match='must name at least one set'):
        run('ood', ood_noise=['none'])
