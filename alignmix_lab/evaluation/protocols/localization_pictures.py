"""Localization pictures: heat maps with predicted and true boxes, and box accuracy over the threshold."""
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from alignmix_lab.runs.plotting import GREY, figure, line, shared_legend

from .boxes import THRESHOLDS, inclusive_iou

TRUE, PREDICTED = '#00E676', '#FF1744'  # bright on photographs and maps; the line styles differ too


@dataclass(frozen=True)
class PictureCell:
    """An image as a model sees it."""
    image: np.ndarray  # (H, W, 3) uint8
    scores: np.ndarray  # (H, W) uint8, the map of the true class
    truth: np.ndarray  # (M, 4) true boxes
    box: np.ndarray  # (1, 4) predicted box
    name: str  # true class
    said: str | None  # predicted class if it is wrong, else None


@dataclass(frozen=True)
class PictureColumn:
    """The cells of a model, and the threshold of its boxes relative to the maximum of the map."""
    label: str
    threshold: float
    cells: list[PictureCell]


def draw_pictures(columns: list[PictureColumn]) -> Figure:
    """Draw a row for each image: the image with its true boxes, then the map and box of each model."""
    fig, axes = figure(len(columns[0].cells), 1 + len(columns), size=(2.3, 2.55))
    for row, cell in enumerate(columns[0].cells):
        show(axes[row, 0], cell, cell.name)
    for place, column in enumerate(columns, start=1):
        for row, cell in enumerate(column.cells):
            iou = inclusive_iou(cell.box, cell.truth).max()
            ax = axes[row, place]
            show(ax, cell, f'IoU {iou:.2f}, ' + ('class right' if cell.said is None else f'taken for {cell.said}'))
            ax.imshow(cell.scores, cmap='jet', alpha=0.45, vmin=0, vmax=255)
            frame(ax, cell.box, PREDICTED, '--')
        head = f'{column.label},\nbox at {column.threshold:.3f} of the maximum'
        axes[0, place].set_title(f'{head}\n{axes[0, place].get_title()}', fontsize=8)
    fig.legend(
        [Line2D([], [], color=TRUE), Line2D([], [], color=PREDICTED, linestyle='--')],
        ['true box', "box of the map's largest contour,\nat the threshold of MaxBoxAcc"],
        loc='outside lower center', ncols=2 if len(columns) > 1 else 1, frameon=False, fontsize=8)
    return fig


def show(ax: Axes, cell: PictureCell, title: str) -> None:
    """Draw an image with its true boxes."""
    ax.imshow(cell.image)
    frame(ax, cell.truth, TRUE, '-')
    ax.set_title(title, fontsize=8)
    ax.set_axis_off()


def frame(ax: Axes, boxes: np.ndarray, color: str, style: str) -> None:
    """Draw the outlines of boxes that include their last row and column."""
    for x0, y0, x1, y1 in boxes:
        ax.add_patch(Rectangle(
            (x0 - 0.5, y0 - 0.5), x1 - x0 + 1, y1 - y0 + 1, fill=False, color=color, linestyle=style, linewidth=2))


def draw_curves(curves: dict[str, np.ndarray], fixed: float) -> Figure:
    """Plot the box accuracy (T,) at IoU 0.5 of each model over the threshold, with its maximum marked.

    `fixed` is the threshold of Top-1 Loc.
    """
    fig, axes = figure(size=(5.6, 3.8))
    ax = axes[0, 0]
    for i, (label, curve) in enumerate(curves.items()):
        best = int(curve.argmax())
        ax.plot(THRESHOLDS, curve, label=f'{label}: {curve[best]:.1f} % at {THRESHOLDS[best]:.3f}',
                markevery=[best], **line(i))
    ax.axvline(fixed, color=GREY, linewidth=1)
    ax.annotate(f'Top-1 Loc: {fixed:g}', (fixed, 1), (3, -3), xycoords=('data', 'axes fraction'),
                textcoords='offset points', rotation=90, va='top', color=GREY, fontsize=8)
    ax.set(
        xlabel='threshold, relative to the maximum of the map', ylabel='images with IoU >= 0.5 (%)', xlim=(0, 1),
        ylim=(0, 100), title='Box of the largest contour; the marker is MaxBoxAcc')
    shared_legend(fig, ax)
    return fig
