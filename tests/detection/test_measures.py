"""VOC's measure against cases worked by hand, COCO's against pycocotools, both against each other."""
import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.annotations import Record
from detection.coco_eval import coco_ground_truth, coco_metrics, coco_results
from detection.voc_eval import average_precision, voc_metrics


def record(boxes, labels=None, difficult=None, crowd=None):
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    count = len(boxes)
    return Record(
        'image', Path('image.png'), 200, 200, boxes, np.array(labels or [1] * count, dtype=int),
        np.array(difficult or [0] * count, dtype=bool), np.array(crowd or [0] * count, dtype=bool),
        (boxes[:, 2:] - boxes[:, :2]).prod(1))


def found(boxes, scores, labels=None):
    return dict(boxes=np.array(boxes, dtype=float).reshape(-1, 4), scores=np.array(scores, dtype=float),
                labels=np.array(labels or [1] * len(scores), dtype=int))


A, B, C = (0, 0, 10, 10), (50, 50, 60, 60), (100, 100, 110, 110)


def voc(records, detections):
    means, _ = voc_metrics(records, detections, ['thing'])
    return means['voc07_11pt'], means['voc_area']


def test_iou_of_inclusive_pixels_is_the_kits():
    """The kit counts (xmax - xmin + 1) pixels: shifted by 3 of 10, squares overlap by half."""
    for shift, is_true in ((3, True), (4, False)):  # 70 / 130 and 60 / 140
        truth = record([[0, 0, 10, 10]])
        assert voc([truth], [found([[shift, 0, 10 + shift, 10]], [0.9])])[1] == float(is_true) * 100


def test_average_precision_by_hand():
    # true, false, true of 2 objects: (recall, precision) = (.5, 1), (.5, .5), (1, 2/3)
    eleven, area = average_precision(np.array([0.5, 0.5, 1.0]), np.array([1, 0.5, 2 / 3]))
    assert eleven == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)  # levels 0 to .5, then .6 to 1
    assert area == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


@pytest.mark.parametrize('detections, area', [
    (found([A, B], [0.9, 0.8]), 1.0),
    (found([A, C, B], [0.9, 0.8, 0.7]), 0.5 + 0.5 * 2 / 3),  # a false one between
    (found([A, A, B], [0.9, 0.8, 0.7]), 0.5 + 0.5 * 2 / 3),  # a second detection of an object is false
    (found([A], [0.9]), 0.5),
    (found([C], [0.9]), 0.0),
    (found([], []), 0.0),
    (found([A, B], [0.9, 0.8], [2, 2]), 0.0),  # the right places, another class
    (found([(0, 0, 10, 5), B], [0.9, 0.8]), 1.0),  # an IoU of exactly 0.5 suffices
    (found([(0, 0, 10, 4.9), B], [0.9, 0.8]), 0.5 * 0.5),  # just below: false, and A is never found
])
def test_voc_by_hand(detections, area):
    means, _ = voc_metrics([record([A, B])], [detections], ['thing', 'other'])
    assert means['voc_area'] == pytest.approx(100 * area)


def test_difficult_objects_count_neither_way():
    truth = [record([A, B], difficult=[0, 1])]
    assert voc(truth, [found([A], [0.9])]) == (100, 100)  # B need not be found
    assert voc(truth, [found([B, B, A], [0.9, 0.8, 0.7])]) == (100, 100)  # nor is finding it, even twice, an error
    assert voc([record([A, B])], [found([B, B, A], [0.9, 0.8, 0.7])])[1] < 100


def test_a_detection_is_compared_with_its_best_object_only():
    """The kit's rule: the second detection overlaps both objects by more than half, its best one is taken: false."""
    truth = [record([(0, 0, 10, 10), (0, 3, 10, 13)])]
    detections = [found([(0, 0, 10, 10), (0, 1, 10, 11)], [0.9, 0.8])]
    assert voc(truth, detections)[1] == pytest.approx(50)


def test_scores_are_ranked_over_images_and_empty_images_give_false_ones():
    truth = [record([A]), record([]), record([B])]
    detections = [found([A], [0.5]), found([C], [0.9]), found([B], [0.7])]
    # false, true, true: precision 0, 1/2, 2/3 at recall 0, 1/2, 1
    assert voc(truth, detections)[1] == pytest.approx(100 * 2 / 3)
    with pytest.raises(ValueError, match='no object to detect'):
        voc([record([])], [found([], [])])


def test_classes_without_objects_stay_out_of_the_mean():
    means, classes = voc_metrics([record([A])], [found([A, B], [0.9, 0.9], [1, 2])], ['thing', 'absent'])
    assert means['voc_area'] == 100 and list(classes) == ['thing']


def random_case(seed, crowd=True):
    rng = np.random.default_rng(seed)
    records, detections = [], []
    for _ in range(12):
        count = rng.integers(0, 6)
        low = rng.uniform(0, 120, (count, 2))
        boxes = np.concatenate([low, low + rng.uniform(5, 75, (count, 2))], 1)
        labels = rng.integers(1, 4, count).tolist()
        truth = record(boxes, labels, crowd=(rng.uniform(size=count) < 0.2).tolist() if crowd else None)
        near = boxes.repeat(2, 0) + rng.normal(0, 4, (2 * count, 4))
        extra = rng.uniform(0, 100, (3, 2))
        near = np.concatenate([near, np.concatenate([extra, extra + 30], 1)])
        picks = np.concatenate([np.repeat(labels, 2), [1, 2, 3]]).astype(int)
        records.append(truth)
        detections.append(found(near, rng.permutation(1000)[:len(near)] / 1000 + len(records) / 1e5, picks.tolist()))
    return records, detections


@pytest.mark.parametrize('seed', range(4))
def test_coco_equals_pycocotools(seed):
    records, detections = random_case(seed)
    names = ['one', 'two', 'three']
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco_ground_truth(records, names)
        truth.createIndex()
        reference = COCOeval(truth, truth.loadRes(coco_results(detections)), 'bbox')
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    means, classes = coco_metrics(records, detections, names)
    expected = [100 * value if value >= 0 else -1 for value in reference.stats[:6]]
    assert list(means.values()) == pytest.approx(expected, abs=1e-6)
    precision = reference.eval['precision'][:, :, :, 0, -1]
    for index, name in enumerate(names):
        assert classes[name]['map'] == pytest.approx(100 * precision[:, :, index].mean(), abs=1e-6)
    assert means['map'] == pytest.approx(np.mean([values['map'] for values in classes.values()]))


def test_voc_area_is_close_to_coco_at_one_half():
    """Apart from matching and COCO's 101 points the two are one measure."""
    records, detections = random_case(7, crowd=False)
    names = ['one', 'two', 'three']
    assert voc_metrics(records, detections, names)[0]['voc_area'] == pytest.approx(
        coco_metrics(records, detections, names)[0]['map50'], abs=1.5)


def test_coco_without_detections_or_without_an_object_size():
    means, classes = coco_metrics([record([A])], [found([], [])], ['thing'])
    assert set(means.values()) == {0.0} and classes == {'thing': dict(map=0.0, map50=0.0)}
    means, _ = coco_metrics([record([A])], [found([A], [0.9])], ['thing'])
    assert means['map_small'] == pytest.approx(100) and means['map_large'] == -1
