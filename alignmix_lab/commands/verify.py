"""`alignmix verify`: find damage in .beton files and in folders of exported weights."""
import argparse
import logging
from pathlib import Path

from alignmix_lab.data.ffcv.verify import verify_beton
from timm_alignmix import weights

_logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None, prog: str = 'alignmix verify') -> None:
    """Run the command; the exit code is 1 if something is damaged."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description='Find damage that nothing else reports: FFCV trains on the pixels of other images if a .beton file '
                    'is damaged, and timm initialises weights missing from a file at random.')
    parser.add_argument('paths', nargs='+', metavar='PATH', help='.beton file, or folder of exported weights')
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    problems = [problem for path in args.paths if (problem := _problem(Path(path)))]
    for problem in problems:
        _logger.error(problem)
    raise SystemExit(1 if problems else 0)


def _problem(path: Path) -> str | None:
    """Describe the damage of a file or folder; if there is none, log a line and return None."""
    try:
        if path.is_dir():
            architecture = weights.verify(path)['architecture']
            _logger.info(f'{path}: every weight of {architecture} is there')
            return None
        damaged = verify_beton(path)
    except (OSError, ValueError, RuntimeError, ImportError) as e:
        return f'error: {e}'
    if not damaged:
        _logger.info(f'{path}: sound')
        return None
    shown = ', '.join(map(str, damaged[:20])) + (', ...' if len(damaged) > 20 else '')
    return f'{path}: {len(damaged)} samples may be damaged ({shown}); copy the file again or convert again'
