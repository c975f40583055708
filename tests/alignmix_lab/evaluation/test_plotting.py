"""What all pictures of evaluations share."""
import math

import pytest

from alignmix_lab.runs.plotting import figure, shared_legend, spread


@pytest.mark.parametrize('labels, columns', (
    (['none', 'mixup'], 2),
    (['none', 'mixup', 'alignmix', 'multimix', 'densemultimix', 'cutmix'], None),
    (['vit_small_patch16_224.densemultimix_in1k'] * 3, None),
    (['a label that is wider than any figure, however few columns its legend has ' * 3], 1),
))
def test_a_shared_legend_is_inside_the_figure(labels, columns):
    fig, axes = figure()
    ax = axes[0, 0]
    for label in labels:
        ax.plot([0, 1], label=label)
    shared_legend(fig, ax)
    legend, = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == labels
    assert columns is None or legend._ncols == columns
    fig.canvas.draw()
    if columns != 1:
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= fig.bbox.width


def test_spread_by_hand():
    assert spread([]) == (None, None) and spread([3.0]) == (3.0, None)
    mean, std = spread([80.0, 84.0])
    assert mean == 82.0 and std == pytest.approx(math.sqrt(8))
