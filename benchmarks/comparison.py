"""What the comparisons of training runs share: runs that are finished stay finished, spreads and curves over seeds."""
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
STYLES = ('-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)))
COLORS = ('#0072b2', '#e69f00', '#009e73', '#cc79a7', '#000000', '#56b4e9', '#d55e00')  # Okabe and Ito's


def train_once(command: Sequence[str], folder: Path) -> Path:
    """Run a training command into a folder, resume it if it was cut, leave it alone if it is finished.

    Args:
        command: Arguments of Python: the script or -m module, and its flags.
        folder: Folder of the run.

    Returns:
        The run's summary.csv.
    """
    done = folder / 'done'
    if not done.exists():
        print(shlex.join(['python', *command]), flush=True)
        resume = ['--resume', 'auto'] if (folder / 'last.pth.tar').exists() else []
        output = ['--output', str(folder.parent), '--experiment', folder.name, '--checkpoint-hist', '1']
        subprocess.run([sys.executable, *command, *output, *resume], check=True, cwd=ROOT)
        done.touch()
    return folder / 'summary.csv'


def mean_spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    spread = f' +- {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{spread}'


def draw_curves(ax: Axes, curves: dict[str, list[list[float]]]) -> None:
    """Mean by epoch, and its range over seeds.

    Args:
        ax: Where to draw.
        curves: For each name the values by epoch of every seed.
    """
    for i, (name, runs) in enumerate(curves.items()):
        columns = list(zip(*runs, strict=True))
        epochs, color = range(1, len(columns) + 1), COLORS[i % len(COLORS)]
        ax.plot(epochs, [statistics.mean(c) for c in columns], color=color, linestyle=STYLES[i % len(STYLES)],
                linewidth=2, label=name)
        ax.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.12)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
