"""Boxes from maps and their judgement, by hand: whole pixels, all contours, thresholds, maps without contrast."""
import cv2
import numpy as np
import pytest

from alignmix_lab.evaluation.protocols.boxes import (
    THRESHOLDS,
    best_ious,
    box_accuracy,
    inclusive_iou,
    max_box_accuracy,
    resize_box,
    score_bytes,
    threshold_boxes,
)


def boxes(*rows):
    return np.array(rows, dtype=np.int64)


def test_iou_counts_the_last_row_and_column():
    # 10x10 and 10x10 pixels that share 5x10; half-open boxes would have 4 * 9 of 2 * 81 - 36.
    assert inclusive_iou(boxes([0, 0, 9, 9]), boxes([5, 0, 14, 9]))[0, 0] == pytest.approx(50 / 150)
    # One common column, where half-open boxes would only touch; a single pixel is a box.
    assert inclusive_iou(boxes([0, 0, 4, 4]), boxes([4, 0, 8, 4]))[0, 0] == pytest.approx(5 / 45)
    assert inclusive_iou(boxes([3, 3, 3, 3]), boxes([3, 3, 3, 3], [4, 3, 4, 3])).tolist() == [[1, 0]]


def test_resized_boxes_are_rounded_down_and_stay_inside():
    assert resize_box(boxes([10, 20, 99, 199]), (100, 200), (224, 224)).tolist() == [[22, 22, 221, 222]]
    assert resize_box(np.array([[0., 0., 120., 90.]]), (100, 100), (50, 50)).tolist() == [[0, 0, 49, 45]]


@pytest.fixture
def two_spots():
    """A large weak spot of 12x10 pixels at level 100 and a small strong one of 4x4 at the maximum."""
    scores = np.zeros((40, 60), dtype=np.uint8)
    scores[5:15, 8:20] = 100
    scores[30:34, 50:54] = 200
    return scores


def test_contours_and_thresholds_of_the_maximum(two_spots):
    # The threshold is a part of the maximum, 200: 0.49 is level 98, below both spots; a box ends one pixel beyond.
    assert threshold_boxes(two_spots, 0.49).tolist() == [[8, 5, 20, 15], [50, 30, 54, 34]]
    # At level 100 exactly the weak spot is not above any more.
    assert threshold_boxes(two_spots, 0.5).tolist() == [[50, 30, 54, 34]]
    two_spots[:, 59] = 200  # at the border there is no pixel beyond
    assert threshold_boxes(two_spots, 0.9)[0].tolist() in ([59, 0, 59, 39], [50, 30, 54, 34])


def test_largest_contour_against_all(two_spots):
    """The true object is the small spot: all contours find it at any threshold, the largest one only when alone."""
    thresholds = np.array([0.0, 0.49, 0.5, 0.999])
    largest, every = best_ious(two_spots, boxes([50, 30, 54, 34]), thresholds)
    assert every.tolist() == [1, 1, 1, 1]
    assert largest.tolist() == [0, 0, 1, 1]


def test_any_true_box_will_do(two_spots):
    largest, _ = best_ious(two_spots, boxes([0, 0, 1, 1], [8, 5, 20, 15]), np.array([0.2]))
    assert largest.tolist() == [1]


def test_a_map_without_contrast_has_one_pixel():
    for class_map in (np.full((4, 4), 3.0), np.full((4, 4), np.nan)):
        scores = score_bytes(class_map, (20, 10))
        assert scores.shape == (10, 20) and not scores.any()
        assert threshold_boxes(scores, 0.3).tolist() == [[0, 0, 0, 0]]
        assert best_ious(scores, boxes([0, 0, 0, 1]), np.array([0.0, 0.5]))[0].tolist() == [0.5, 0.5]


def test_thresholds_by_level_are_thresholds_one_by_one():
    scores = score_bytes(np.random.default_rng(0).normal(size=(6, 7)), (70, 60))
    truth = boxes([10, 10, 40, 50], [0, 0, 5, 5])
    largest, every = best_ious(scores, truth)
    for place in range(0, 1000, 37):
        level = int(THRESHOLDS[place] * scores.max())
        _, above = cv2.threshold(scores, level, 255, cv2.THRESH_BINARY)
        contours = cv2.findContours(above, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
        found = []
        for contour in sorted(contours, key=cv2.contourArea, reverse=True):
            x, y, w, h = cv2.boundingRect(contour)
            found.append([x, y, min(x + w, 69), min(y + h, 59)])
        ious = inclusive_iou(np.array(found), truth)
        assert largest[place] == ious[0].max() and every[place] == ious.max()


def test_maps_are_resized_bicubically_and_then_spread():
    class_map = np.array([[-2., 0.], [1., 6.]])
    scores = score_bytes(class_map, (8, 8))
    resized = cv2.resize(class_map.astype(np.float32), (8, 8), interpolation=cv2.INTER_CUBIC)
    expected = (resized - resized.min()) / (resized.max() - resized.min()) * 255
    assert scores.min() == 0 and scores.max() == 255
    np.testing.assert_allclose(scores, expected, atol=1)


def test_the_best_threshold_is_one_for_the_whole_set():
    iou_NT = np.zeros((4, len(THRESHOLDS)))
    iou_NT[0, :100] = iou_NT[1, 50:200] = 0.5  # exactly enough
    iou_NT[2, 900:] = 0.9
    assert box_accuracy(iou_NT, 0.5)[[0, 60, 150, 950]].tolist() == [25, 50, 25, 25]
    assert max_box_accuracy(iou_NT) == (50, pytest.approx(0.05))  # not 75: each image at its own best threshold
    assert max_box_accuracy(iou_NT, 0.7) == (25, pytest.approx(0.9))


def test_resized_coordinates_are_those_of_the_exact_quotient():
    """Against whole-number arithmetic: dividing first takes 92 of these to the pixel below."""
    sizes = [(width, height) for width in range(201, 520, 7) for height in range(203, 500, 11)]
    for width, height in sizes:
        box = np.array([[width // 3, height // 4, width - 1, height // 2]])
        exact = [[x * 224 // width, y * 224 // height] for x, y in ((box[0, 0], box[0, 1]), (box[0, 2], box[0, 3]))]
        np.testing.assert_array_equal(resize_box(box, (width, height), (224, 224)), [exact[0] + exact[1]])
