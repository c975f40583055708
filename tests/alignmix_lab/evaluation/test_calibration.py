"""ECE, OE, Brier and NLL by hand and against torchmetrics; empty bins; probabilities that are none."""
import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from alignmix_lab.evaluation.predictions import summarize
from alignmix_lab.evaluation.protocols.calibration import expected_calibration_error, fill_bins, overconfidence_error

# Five bins: [0, .2) empty; [.2, .4) .3 wrong; [.4, .6) empty; [.6, .8) .7 right, .62 wrong; [.8, 1] .9 wrong, 1 right.
CONFIDENCE = np.array([0.3, 0.7, 0.9, 0.62, 1.0])
CORRECT = np.array([False, True, False, False, True])


def test_by_hand():
    bins = fill_bins(CONFIDENCE, CORRECT, 5)
    assert bins.count.tolist() == [0, 1, 0, 2, 2]
    np.testing.assert_allclose(bins.confidence, [np.nan, 0.3, np.nan, 0.66, 0.95])
    np.testing.assert_allclose(bins.accuracy, [np.nan, 0, np.nan, 0.5, 0.5])
    # ECE = 1/5 * 0.3 + 2/5 * 0.16 + 2/5 * 0.45 = 0.06 + 0.064 + 0.18
    assert expected_calibration_error(CONFIDENCE, CORRECT, 5) == pytest.approx(0.304)
    # OE = 1/5 * 0.3 * 0.3 + 2/5 * 0.66 * 0.16 + 2/5 * 0.95 * 0.45 = 0.018 + 0.04224 + 0.171
    assert overconfidence_error(bins) == pytest.approx(0.23124)


def test_underconfidence_is_no_overconfidence():
    """Confidence 0.5, all right: ECE = 0.5 and OE = 0; the edge 0.5 of two bins belongs to the upper one."""
    bins = fill_bins(np.full(4, 0.5), np.ones(4), 2)
    assert bins.count.tolist() == [0, 4]
    assert overconfidence_error(bins) == 0
    assert expected_calibration_error(np.full(4, 0.5), np.ones(4), 2) == pytest.approx(0.5)


def test_against_torchmetrics():
    """Concentrated probabilities, so that several bins are empty; also by the table of bins."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    logits[:150] *= 12
    labels = torch.randint(0, 4, (200,), generator=generator)
    probs = logits.softmax(dim=1)
    found = {key: value.numpy() for key, value in summarize(logits, labels, 'net').items()}
    correct = found['prediction'] == found['label']
    for count in (15, 40):
        bins = fill_bins(found['confidence'], correct, count)
        assert (bins.count == 0).sum() >= 3
        expected = MulticlassCalibrationError(4, n_bins=count, norm='l1')(probs, labels).item()
        ece = expected_calibration_error(found['confidence'], correct, count)
        assert ece == pytest.approx(expected, abs=1e-6)  # theirs rounds to float32
        assert ece == pytest.approx(np.nansum(bins.count * abs(bins.accuracy - bins.confidence)) / 200, abs=1e-12)


def test_a_confidence_of_one_is_in_the_last_bin():
    """1.0 right and 0.96 wrong share a bin: confidence 0.98, accuracy 0.5. In bins of their own: 0 and 0.96 / 2."""
    confidence, correct = np.array([1.0, 0.96]), np.array([True, False])
    assert fill_bins(confidence, correct).count.tolist() == [0] * 14 + [2]
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.48)
    assert overconfidence_error(fill_bins(confidence, correct)) == pytest.approx(0.98 * 0.48)


def test_scores_of_an_image_by_hand():
    """Probabilities 1/2, 1/4, 1/4. True class 0: Brier 1/4 + 1/16 + 1/16 = 0.375, NLL ln 2. True class 2: 1/4 + 1/16 +
    9/16 = 0.875, NLL ln 4, and two classes before it, since equal ones count by their index."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().repeat(3, 1)
    found = summarize(logits, torch.tensor([0, 1, 2]), 'net')
    torch.testing.assert_close(found['brier'], torch.tensor([0.375, 0.875, 0.875]).double())
    torch.testing.assert_close(found['nll'], torch.tensor([2, 4, 4]).double().log())
    assert found['rank'].tolist() == [0, 1, 2]
    assert found['prediction'].tolist() == [0, 0, 0]
    torch.testing.assert_close(found['confidence'], torch.full((3,), 0.5).double())


@pytest.mark.parametrize('confidence, message', [
    ([0.5, np.nan], '1 of 2 confidences are not probabilities, e.g. nan'),
    ([0.5, 1.2], 'not probabilities, e.g. 1.2'),
    ([0.5], 'got 1 and 2'),
])
def test_what_is_no_probability(confidence, message):
    with pytest.raises(ValueError, match=message):
        fill_bins(np.array(confidence), np.array([True, False]))
    with pytest.raises(ValueError, match='got 0 and 0'):
        fill_bins(np.array([]), np.array([]))


def test_logits_that_are_not_finite():
    logits = torch.tensor([[0., 1.], [float('nan'), 0.], [0., float('inf')]])
    with pytest.raises(ValueError, match='net: the output for 2 of 3 images is not finite'):
        summarize(logits, torch.zeros(3, dtype=torch.long), 'net')


def test_protocol(run, logits, pixels):
    labels = torch.from_numpy(pixels[1])
    found = run('calibration', bins=10)
    for row, own in zip(found['rows'], logits, strict=True):
        probs = own.softmax(dim=1)
        confidence, prediction = probs.max(dim=1)
        expected = {
            'ece': 100 * MulticlassCalibrationError(3, n_bins=10, norm='l1')(probs, labels).item(),
            'brier': (probs - torch.eye(3)[labels]).square().sum(1).mean().item(),
            'nll': torch.nn.functional.cross_entropy(own, labels).item(),
            'confidence': 100 * confidence.mean().item(),
            'top1': 100 * (prediction == labels).double().mean().item(),
        }
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
        assert sum(found['details']['bins'][row['model']]['count']) == row['images'] == 15
    assert any('10 bins of equal width' in note for note in found['notes'])
