"""Pictures of detections."""
import colorsys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image


def draw_detections(
        image: torch.Tensor, detections: dict[str, np.ndarray], class_names: list[str], threshold: float = 0.5,
        true_boxes: np.ndarray | None = None) -> Image.Image:
    """Draw boxes with class and score, the best on top, and true boxes as thin white lines.

    Args:
        image: uint8 (3, H, W).
        detections: `boxes` (N, 4), `scores` (N,) and `labels` (N,) from 1.
    """
    picture = to_pil_image(image)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(min(picture.size) / 150))
    font = ImageFont.load_default(max(11, round(min(picture.size) / 28)))
    for box in () if true_boxes is None else true_boxes:
        draw.rectangle(_ordered(box), outline='white', width=max(1, line // 2))
    for index in np.argsort(detections['scores']):
        score, label, box = (detections[key][index] for key in ('scores', 'labels', 'boxes'))
        if score < threshold:
            continue
        hue = (0.12 + (label - 1) / len(class_names)) % 1  # a light colour per class, evenly spread
        color = tuple(round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.75, 1))
        x, y = _ordered(box)[:2]
        draw.rectangle(_ordered(box), outline=color, width=line)
        text = f'{class_names[label - 1]} {score:.2f}'
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = right - left + 4, bottom - top + 4
        x = min(max(x, 0), max(picture.width - width, 0))
        y = y - height if y >= height else max(y, 0)  # above the box if there is room, else inside it
        draw.rectangle((x, y, x + width, y + height), fill=color)
        draw.text((x + 2 - left, y + 2 - top), text, fill='black', font=font)
    return picture


def _ordered(box: np.ndarray) -> tuple[float, ...]:
    """Convert a box for PIL, which includes the last pixel and refuses boxes that end before they start."""
    x1, y1, x2, y2 = (float(value) for value in box)
    return x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)
