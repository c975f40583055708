"""Common style of all figures: colours, lines and layout.

The colours, by Okabe and Ito, can be distinguished by colour-blind readers; lines and markers differ too, for printing
in grey. Figures are made without pyplot, so there is no global state and no window.
"""
import io
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ('#0072B2', '#E69F00', '#009E73', '#D55E00', '#CC79A7', '#56B4E9', '#000000', '#B8A100')
LINES = ('-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1)))
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '*')
GREY = '#767676'
STYLE = {
    'font.size': 10, 'axes.titlesize': 10, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
    'axes.axisbelow': True, 'grid.alpha': 0.3, 'legend.frameon': False, 'lines.linewidth': 1.8, 'lines.markersize': 5}


def color(index: int) -> str:
    """Return the colour of the index-th model, the same in every figure."""
    return COLORS[index % len(COLORS)]


def line(index: int) -> dict[str, Any]:
    """Return the colour, line style and marker of the index-th model."""
    return {
        'color': color(index), 'linestyle': LINES[index % len(LINES)], 'marker': MARKERS[index % len(MARKERS)]}


def as_png(fig: Figure, dpi: int = 150) -> bytes:
    """Render a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format='png', dpi=dpi)
    return buffer.getvalue()


def figure(
        rows: int = 1, columns: int = 1, size: tuple[float, float] = (4.2, 3.4), title: str = '',
        **subplots: Any) -> tuple[Figure, np.ndarray]:
    """Create a figure with an array (rows, columns) of axes, each `size` inches wide and high.

    `subplots` are further arguments of `Figure.subplots`, e.g. `sharex=True`.
    """
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(size[0] * columns, size[1] * rows), layout='constrained')
        axes = fig.subplots(rows, columns, squeeze=False, **subplots)
        if title:
            fig.suptitle(title, fontsize=11)
    return fig, axes


def panels(count: int, most_columns: int = 3, **options: Any) -> tuple[Figure, list[Axes]]:
    """Create a figure with `count` axes in rows of up to `most_columns`; the rest of the last row stays empty."""
    columns = min(count, most_columns)
    fig, axes = figure(-(-count // columns), columns, **options)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    for ax in axes.flat[max(count - columns, 0):count]:
        ax.tick_params(labelbottom=True)  # the lowest of its column, though an empty place may be below it
    return fig, list(axes.flat[:count])


def paired_panels(count: int, title: str) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """Create a figure with `count` pairs of axes, up to three in a row, and return it with (upper, lower) of each pair.

    The axes of a pair share their x axis; the upper one is three times as high.
    """
    columns = min(count, 3)
    rows = -(-count // columns)
    fig, axes = figure(2 * rows, columns, size=(3.2, 1.9), title=title, height_ratios=(3, 1) * rows)
    pairs = [(axes[2 * row, column], axes[2 * row + 1, column]) for row in range(rows) for column in range(columns)]
    for upper, lower in pairs[:count]:
        upper.sharex(lower)
        upper.tick_params(labelbottom=False)
    for ax in (ax for pair in pairs[count:] for ax in pair):
        ax.set_axis_off()
    return fig, pairs[:count]


def shared_legend(fig: Figure, ax: Axes) -> None:
    """Add one legend below all axes with the labels of `ax`, in as many columns as fit."""
    handles, labels = ax.get_legend_handles_labels()
    for ncols in range(min(len(labels), 5), 0, -1):
        legend = fig.legend(handles, labels, loc='outside lower center', ncols=ncols, frameon=False)
        if ncols == 1 or legend.get_window_extent().width <= fig.bbox.width:
            break
        legend.remove()


def bars(
        ax: Axes, labels: Sequence[str], values: Sequence[float], form: str = '.1f',
        errors: Sequence[float] | None = None) -> None:
    """Draw a horizontal bar per model in its colour, from top to bottom, with the value at the end.

    `errors` are half lengths of error bars.
    """
    places = np.arange(len(labels))
    drawn = ax.barh(places, values, color=[color(i) for i in range(len(labels))], height=0.7, xerr=errors,
                    error_kw={'ecolor': '#333333', 'elinewidth': 1.2, 'capsize': 3})
    ax.bar_label(drawn, labels=[format(value, form) for value in values], padding=4,
                 bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.5})
    ax.set_yticks(places, labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)  # not invert_yaxis(): axes that share y would undo it
    ax.margins(x=0.15)
    ax.grid(visible=False, axis='y')


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    return (statistics.mean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None)


def draw_by_epoch(ax: Axes, curves: dict[str, list[dict[int, float]]]) -> None:
    """Draw the mean by epoch and, for several runs, their range.

    `curves` has the values by epoch of every run, for each name; epochs missing in some of the runs are left out.
    """
    for i, (name, runs) in enumerate(curves.items()):
        epochs = sorted(set.intersection(*(set(run) for run in runs)))
        values = [[run[epoch] for run in runs] for epoch in epochs]
        style = {**line(i), 'marker': None}
        ax.plot([epoch + 1 for epoch in epochs], [statistics.mean(v) for v in values], label=name, **style)
        if len(runs) > 1:
            ax.fill_between([epoch + 1 for epoch in epochs], [min(v) for v in values], [max(v) for v in values],
                            color=style['color'], alpha=0.12, linewidth=0)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel('epoch')
