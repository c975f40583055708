"""Weakly supervised localization: boxes from class activation maps of networks trained without boxes.

Class activation maps: Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016, arXiv
1512.04150. MaxBoxAcc and MaxBoxAccV2: Choe et al., CVPR 2020, arXiv 2001.07437. Top-1 Loc with a fixed threshold, as in
CutMix, arXiv 1905.04899. Table 5 of the AlignMixup paper, arXiv 2103.15375.

A ResNet has 7x7 positions at 224 px. With `--model-kwargs output_stride=16`, also in training, timm removes the stride
of its last stage, which gives 14x14 positions as in the papers (timm also dilates later convolutions of that stage).

Shape suffixes: B batch, C classes, R positions, T thresholds, N pairs of an image and a class it shows.
"""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from alignmix_lab.data.images.decode import image_size
from alignmix_lab.runs.options import Options, config_option
from timm_alignmix.anatomy import Anatomy

from ..base import register_protocol
from ..context import Evaluation
from ..models import EvalModel
from ..result import Column, Result
from .box_data import BoxSource, open_boxes
from .boxes import (
    IOUS,
    THRESHOLDS,
    best_ious,
    box_accuracy,
    inclusive_iou,
    max_box_accuracy,
    opencv,
    resize_box,
    score_bytes,
    threshold_boxes,
)
from .localization_pictures import PictureCell, PictureColumn, draw_curves, draw_pictures


class ClassMaps:
    """Class activation maps: the classifier's logits at every position of the last feature map.

    The logits of a position are class weight . features plus a constant, which has no effect once maps are scaled to
    their range. Layers between pooling and classifier (e.g. the norm of ConvNeXt) are applied at each position. For
    models that classify a class token, the positions are the patch tokens.

    Raises:
        ValueError: The classifier does not use the mean over the positions of a feature map.
    """

    def __init__(self, network: nn.Module, img_size: tuple[int, int]) -> None:
        self._network, self._img_size = network, img_size
        self._head = Anatomy(network, img_size).dense_head(allow_class_token=True)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute logits (B, C) and maps (B, C, h, w) in float32 from normalised images."""
        found: list[torch.Tensor] = []
        handle = self._network.get_submodule(self._head.name).register_forward_hook(
            lambda module, inputs, output: found.append(output))
        try:
            logits = self._network(images)
        finally:
            handle.remove()
        logits_BRC, _ = self._head(found[0])
        return logits.float(), logits_BRC.float().transpose(1, 2).unflatten(2, self._grid(found[0]))

    def _grid(self, feature_map: torch.Tensor) -> tuple[int, int]:
        kind = self._head.layout.kind
        if kind != 'NLC':
            return tuple(feature_map.shape[2:] if kind == 'NCHW' else feature_map.shape[1:3])
        positions = feature_map.shape[1] - self._head.layout.prefix
        height = round((positions * self._img_size[0] / self._img_size[1]) ** 0.5)
        return height, positions // height


@dataclass
class LocalizationOptions(Options):
    """Options of the localization protocol."""
    cam_threshold: float = config_option(
        'Localization', 0.15, 'threshold of the object for Top-1 Loc and GT-known Loc, relative to the maximum of the '
        'map', float, low=0, below=1)
    localization_pictures: int = config_option('Localization', 6, 'number of images in the picture', int, low=1)


@dataclass(frozen=True)
class Judged:
    """Evaluation of an image and a class it shows."""
    correct: bool  # whether the class is predicted
    fixed_iou: float  # IoU of the box at the fixed threshold
    largest: np.ndarray  # (T,) best IoU of the box of the largest contour at each threshold
    every: np.ndarray  # (T,) best IoU of the boxes of all contours


def judge(class_map: np.ndarray, truth: np.ndarray, correct: bool, size: tuple[int, int], threshold: float) -> Judged:
    """Compare the boxes of a class activation map (h, w) with the true boxes (M, 4).

    `size` is width and height of the network's image, in whose pixels the boxes are.
    """
    scores = score_bytes(class_map, size)
    largest, every = best_ious(scores, truth)
    fixed, _ = best_ious(scores, truth, np.array([threshold]))
    return Judged(correct, float(fixed[0]), largest, every)


@register_protocol('localization', LocalizationOptions)
def localization(ev: Evaluation) -> Result:
    """Boxes from class activation maps: Top-1 Loc, GT-known Loc, MaxBoxAcc, MaxBoxAccV2 (CUB-200-2011, VOC folders)."""
    source = open_boxes(ev.config.data_dir, ev.config.split)
    opencv()
    rows, curves, columns = [], {}, []
    for model in ev.models:
        found, seen = evaluate_boxes(ev, model, source)
        shape = '{}x{} of {}x{}'.format(*seen['class_map'].shape[1:], *seen['image'].shape[2:])
        rows.append({'model': model.label, **measures(found), 'map': shape})
        curves[model.label] = box_accuracy(found['largest'], 0.5)
        columns.append(seen_by(model, source, seen, rows[-1]['threshold']))
    fixed = ev.config.cam_threshold
    return Result(
        columns={
            'top1': Column('top-1 (%)', '.2f', 'higher'),
            'top1_loc': Column('Top-1 Loc (%)', '.2f', 'higher'),
            'gt_known': Column('GT-known Loc (%)', '.2f', 'higher'),
            'maxboxacc': Column('MaxBoxAcc (%)', '.2f', 'higher'),
            'threshold': Column('at threshold', '.3f'),
            'maxboxacc_v2': Column('MaxBoxAccV2 (%)', '.2f', 'higher'),
            **{f'v2_{100 * iou:.0f}': Column(f'V2 at IoU {iou}', '.2f', 'higher') for iou in IOUS},
            'map': Column('map'),
            'pairs': Column('images', 'd'),
        },
        rows=rows,
        notes=[
            "Whole images are resized to the model's image size. Map: classifier weight of the class times the last "
            'feature map, resized bicubically and scaled to its range.',
            f'Top-1 Loc: the class is predicted and the box of the largest contour above {fixed:g} of the maximum has '
            'IoU >= 0.5. GT-known Loc: the same without the prediction. Maps are those of the true class.',
            'MaxBoxAcc: IoU >= 0.5 for the largest contour, at the best threshold for the whole set (in steps of '
            '0.001). MaxBoxAccV2: mean over IoU 0.3, 0.5, 0.7 of the same with the best box of all contours. Both '
            'select the threshold on the evaluated images.',
            f'A box of the whole image would be right for {whole_image(source):.1f} % of the images at IoU 0.5.',
            'IoU counts whole pixels, including the last row and column, for the best true box of the class. An image '
            'that shows several classes counts once for each.',
        ],
        details={'thresholds': THRESHOLDS, 'box_accuracy': curves},
        figures={'': draw_pictures(columns), 'curves': draw_curves(curves, fixed)} if ev.is_main else {},
    )


def evaluate_boxes(
        ev: Evaluation, model: EvalModel, source: BoxSource) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Evaluate the boxes of a model for all images.

    Returns:
        The entries of `Judged` for all pairs of an image and a class; and for the images of the picture `index`,
        `image` (3, H, W) uint8, `class_map` of the first class shown, and `predicted` class.
    """
    loader = ev.unlabelled(model, source, crop_pct=1.0, crop_mode='squash')
    labels, sides = class_labels(source, model), tuple(model.data_config['input_size'][1:])
    maps = ClassMaps(model.network.network, sides)
    first = np.cumsum([0, *(len(image.boxes) for image in source.dataset)])
    pictured = np.linspace(0, source.num_samples - 1, ev.config.localization_pictures).round()
    run = partial(judge, size=sides[::-1], threshold=ev.config.cam_threshold)
    indices, judged = [], []
    seen: dict[str, list[Any]] = {'index': [], 'image': [], 'class_map': [], 'predicted': []}
    with ThreadPoolExecutor(max(ev.config.workers, 1)) as pool, \
            ev.progress(f'localization {model.label}', len(loader)) as bar:
        for batch in loader:
            with ev.accelerator.autocast():
                logits, maps_BChw = maps(model.network.normalize(batch.images))
            tasks = []
            for row, index in enumerate(batch.indices.tolist()):
                predicted = logits[row].argmax().item()
                pairs = [
                    (maps_BChw[row, labels[name]].cpu().numpy(), truth, predicted == labels[name])
                    for name, truth in scaled_boxes(source, index, sides).items()]
                tasks += pairs
                indices += range(first[index], first[index] + len(pairs))
                if index in pictured:
                    image = (batch.images[row] * 255).round().byte().cpu().numpy()
                    for key, value in zip(seen, (index, image, pairs[0][0], predicted), strict=True):
                        seen[key].append(value)
            judged += pool.map(run, *zip(*tasks, strict=True))
            bar.update()
    names = [field.name for field in fields(Judged)]
    columns = {name: np.array([getattr(pair, name) for pair in judged]) for name in names}
    found = ev.gather(np.array(indices, dtype=np.int64), **columns)
    places = np.array(seen.pop('index'), dtype=np.int64)
    return found, ev.gather(places, **{key: np.array(values) for key, values in seen.items()})


def seen_by(model: EvalModel, source: BoxSource, seen: dict[str, np.ndarray], threshold: float) -> PictureColumn:
    """Prepare a model's column of the picture."""
    labels, cells = class_labels(source, model), []
    names = model.class_names or source.class_names
    for index, image, class_map, predicted in zip(*seen.values(), strict=True):
        sides = image.shape[1:]
        name, truth = next(iter(scaled_boxes(source, index, sides).items()))
        scores = score_bytes(class_map, sides[::-1])
        box = threshold_boxes(scores, threshold)[:1]
        said = None if predicted == labels[name] else str(names[predicted])
        cells.append(PictureCell(image.transpose(1, 2, 0), scores, truth, box, name, said))
    return PictureColumn(model.label, threshold, cells)


def scaled_boxes(source: BoxSource, index: int, sides: tuple[int, int]) -> dict[str, np.ndarray]:
    """True boxes of an image by class, in pixels of the resized image."""
    image = source.dataset[index]
    size = image_size(image.path)
    return {name: resize_box(boxes, size, sides[::-1]) for name, boxes in image.boxes.items()}


def class_labels(source: BoxSource, model: EvalModel) -> dict[str, int]:
    """Map each class of the data to the model's label.

    Raises:
        ValueError: The model does not know a class, or has no class names and another number of classes.
    """
    known = model.class_names
    if known:
        unknown = [name for name in source.class_names if name not in known]
        if unknown:
            raise ValueError(
                f'{source.title} shows classes that {model.label} was not trained on: {", ".join(unknown[:5])}; its '
                f'classes are {", ".join(known[:10])}{", ..." if len(known) > 10 else ""}')
        return {name: known.index(name) for name in source.class_names}
    if model.num_classes != len(source.class_names):
        raise ValueError(
            f'{source.title} has {len(source.class_names)} classes, {model.label} has {model.num_classes} and no class '
            'names; evaluate a training checkpoint or an export for this data, which have names')
    return {name: label for label, name in enumerate(source.class_names)}


def whole_image(source: BoxSource) -> float:
    """Percentage of pairs of an image and a class for which a box of the whole image has an IoU of 0.5 or more."""
    sides = 1000, 1000  # any size gives the same percentage, except for rounding
    truths = [truth for i in range(source.num_samples) for truth in scaled_boxes(source, i, sides).values()]
    whole = np.array([[0, 0, sides[1] - 1, sides[0] - 1]])
    return 100 * float(np.mean([inclusive_iou(whole, truth).max() >= 0.5 for truth in truths]))


def measures(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Compute a row of the table."""
    hit = found['fixed_iou'] >= 0.5
    accuracy, threshold = max_box_accuracy(found['largest'])
    v2 = {f'v2_{100 * iou:.0f}': max_box_accuracy(found['every'], iou)[0] for iou in IOUS}
    return {
        'top1': 100 * float(found['correct'].mean()),
        'top1_loc': 100 * float((hit & found['correct']).mean()),
        'gt_known': 100 * float(hit.mean()),
        'maxboxacc': accuracy,
        'threshold': threshold,
        'maxboxacc_v2': float(np.mean(list(v2.values()))),
        **v2,
        'pairs': len(hit),
    }
