"""Figures by class: recall, precision, F1, average precision, and which classes are confused."""
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    average_precision_score,
    confusion_matrix,
    precision_recall_fscore_support,
)

from alignmix_lab.runs.plotting import panels

MOST_NAMED = 24  # with more classes, a confusion matrix has neither names nor numbers


def class_scores(label: np.ndarray, prediction: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Recall, precision and F1 of each class, and its number of images, by scikit-learn.

    Args:
        label, prediction: (N,) classes, or (N, num_classes) of 0 and 1.

    Returns:
        `images` (num_classes,), and `recall`, `precision` and `f1` in per cent: NaN for the recall of a class without
        images, the precision of one that is never predicted, and the F1 of a class that is neither.
    """
    if label.ndim == 2:  # scikit-learn would take a single column for two classes
        label, prediction = (np.pad(rows, ((0, 0), (0, 1))) for rows in (label, prediction))
    precision, recall, f1, images = precision_recall_fscore_support(
        label, prediction, labels=np.arange(num_classes), average=None, zero_division=np.nan)
    return {'images': images, 'recall': 100 * recall, 'precision': 100 * precision, 'f1': 100 * f1}


def average_precision(logits: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Average precision of each class in per cent, by scikit-learn; 0 for a class without images.

    Only the order of the logits matters. Torchmetrics orders probabilities, and those of large logits are equal.

    Args:
        logits: (N, C).
        label: (N, C) of 0 and 1.
    """
    return np.array([
        100 * average_precision_score(own, scores) if own.any() else 0.0
        for own, scores in zip(label.T, logits.T, strict=True)])


def class_table(model: str, names: list[str], scores: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Rows for a CSV file, one for each class."""
    return [
        {'model': model, 'class': name, **{key: value[index].item() for key, value in scores.items()}}
        for index, name in enumerate(names)]


def most_confused(label: np.ndarray, prediction: np.ndarray, names: list[str], count: int = 20) -> list[dict[str, Any]]:
    """Pairs of a class and another that is predicted for it, those of most images first."""
    matrix = confusion_matrix(label, prediction, labels=np.arange(len(names)))
    of = matrix.sum(axis=1)
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind='stable')[:count]
    return [
        {'class': names[true], 'predicted': names[found], 'images': int(matrix[true, found]), 'of': int(of[true])}
        for true, found in zip(*np.unravel_index(order, matrix.shape), strict=True) if matrix[true, found]]


def draw_confusion(predictions: dict[str, tuple[np.ndarray, np.ndarray]], names: list[str]) -> Figure:
    """Draw a confusion matrix for each model: what share of the images of a class is predicted to be of another.

    `predictions` has labels and predictions, (N,) each, by model. With more than 24 classes there is a picture alone.
    """
    few = len(names) <= MOST_NAMED
    side = 2.2 + 0.36 * len(names) if few else 7.5
    fig, axes = panels(len(predictions), size=(side, side if few else 0.86 * side))
    for ax, (model, (label, prediction)) in zip(axes, predictions.items(), strict=True):
        shares = 100 * confusion_matrix(label, prediction, labels=np.arange(len(names)), normalize='true')
        display = ConfusionMatrixDisplay(shares, display_labels=names).plot(
            ax=ax, include_values=few, cmap='Blues', values_format='.0f', xticks_rotation='vertical', colorbar=not few,
            # The layout leaves too little room around axes of a fixed aspect. With many classes the
            # root of a share shows small ones.
            im_kw={'aspect': 'auto', 'norm': PowerNorm(1 if few else 0.5, vmin=0, vmax=100)},
            text_kw={'fontsize': 8} if few else None)
        ax.grid(visible=False)
        ax.set(title=f'{model}: share of the images of a class (%)', xlabel='predicted class', ylabel='class')
        if few:
            for text in display.text_.flat:
                if text.get_text() == '0':
                    text.set_text('')
        else:
            ax.set(xticks=[], yticks=[])
    return fig
