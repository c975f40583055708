"""Comparisons of detectors: runs that are finished stay finished, spreads and curves over seeds."""
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from alignmix_lab.runs.plotting import draw_by_epoch, spread

ROOT = Path(__file__).resolve().parent.parent


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
    mean, std = spread(values)
    return f'{mean:.{digits}f}' + ('' if std is None else f' +- {std:.{digits}f}')


def draw_curves(ax: Axes, curves: dict[str, list[list[float]]]) -> None:
    """Mean by epoch, and its range over seeds.

    Args:
        ax: Where to draw.
        curves: For each name the values by epoch of every seed.
    """
    draw_by_epoch(ax, {name: [dict(enumerate(run)) for run in runs] for name, runs in curves.items()})
    ax.grid(alpha=0.3)
