"""COCO's average precision, by faster-coco-eval."""
from collections.abc import Mapping, Sequence

import numpy as np

from .annotations import Record

# Names of pycocotools' first six figures.
STATS = ('map', 'map50', 'map75', 'map_small', 'map_medium', 'map_large')


def coco_ground_truth(records: Sequence[Record], class_names: Sequence[str]) -> dict:
    """Make the content of a COCO annotation file; image ids are indices of `records`, category ids are the labels.

    VOC's difficult objects become crowd regions, so that detections of them are ignored. (COCO compares crowd regions
    by intersection over the detection's area, which is more lenient.)
    """
    annotations = []
    for index, record in enumerate(records):
        for box, label, skip, area in zip(
                record.boxes, record.labels, record.crowd | record.difficult, record.areas, strict=True):
            annotations.append(dict(
                id=len(annotations) + 1, image_id=index, category_id=int(label),
                bbox=[*box[:2].tolist(), *(box[2:] - box[:2]).tolist()], area=float(area), iscrowd=int(skip)))
    return dict(
        info={},
        images=[dict(id=index, width=record.width, height=record.height) for index, record in enumerate(records)],
        annotations=annotations, categories=[dict(id=label, name=name) for label, name in enumerate(class_names, 1)])


def coco_results(
        detections: Sequence[dict[str, np.ndarray]], image_ids: Sequence[int | str] | None = None,
        category_ids: Mapping[int, int] | None = None) -> list[dict]:
    """Convert detections to entries of a COCO results file.

    Args:
        detections: For each image `boxes` (N, 4), `scores` (N,) and `labels` (N,).
        image_ids: Ids of the images; None numbers them from 0.
        category_ids: Ids by label, without which detections are left out; None for the labels.
    """
    return [
        dict(image_id=image_id, category_id=int(label if category_ids is None else category_ids[label]),
             score=float(score), bbox=[*box[:2].tolist(), *(box[2:] - box[:2]).tolist()])
        for image_id, found in zip(image_ids or range(len(detections)), detections, strict=True)
        for box, score, label in zip(found['boxes'], found['scores'], found['labels'], strict=True)
        if category_ids is None or label in category_ids
    ]


def coco_metrics(
        records: Sequence[Record],
        detections: Sequence[dict[str, np.ndarray]],
        class_names: Sequence[str],
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Compute COCO's box average precision in per cent; for the arguments see `voc_metrics`.

    Returns:
        `map` (mean over IoU 0.5, 0.55, ..., 0.95), `map50`, `map75` and `map_small`, `map_medium`, `map_large` by
        object area (-1, as in COCO, if there are no objects of that size); and `map` and `map50` of each class with
        objects.
    """
    def silent(*args) -> None:  # the library prints a table of its own
        pass

    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as e:
        raise ImportError("COCO's metric needs faster-coco-eval: pip install -e '.[detection]'") from e

    results = coco_results(detections)
    if not results:  # the library does not accept an empty list
        counted = {int(label) for record in records for label in record.labels[~(record.crowd | record.difficult)]}
        return dict.fromkeys(STATS, 0.0), {class_names[label - 1]: dict(map=0.0, map50=0.0) for label in counted}
    truth = COCO(coco_ground_truth(records, class_names), print_function=silent)
    evaluation = COCOeval_faster(truth, truth.loadRes(results), iouType='bbox', print_function=silent)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = [100 * float(value) if value >= 0 else -1.0 for value in evaluation.stats[:6]]
    precision = evaluation.eval['precision'][:, :, :, 0, -1]  # (IoU, recall, class), any area, 100 detections
    per_class = {}
    for index, name in enumerate(class_names):
        of_class = precision[:, :, index]
        if (of_class > -1).any():
            per_class[name] = dict(map=100 * float(of_class.mean()), map50=100 * float(of_class[0].mean()))
    return dict(zip(STATS, values, strict=True)), per_class
