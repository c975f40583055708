"""`alignmix export`: write a training checkpoint as a folder that plain timm loads."""
import argparse

from timm.utils import setup_default_logging

from alignmix_lab.classification.export_checkpoint import export_checkpoint
from alignmix_lab.runs.options import exit_with_message


def main(argv: list[str] | None = None, prog: str = 'alignmix export') -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Write a checkpoint as a folder for timm.create_model('local-dir:FOLDER').")
    parser.add_argument('checkpoint', help='last.pth.tar, model_best.pth.tar, ... of a run')
    parser.add_argument('folder', help='folder to write')
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--ema', action='store_true', default=None,
                       help='the moving average (the default if there is one)')
    which.add_argument('--raw', action='store_false', dest='ema', help='the trained weights')
    parser.add_argument('--dataset', help='short name of the data set, for the tag, e.g. in1k')
    parser.add_argument('--license', default='unknown', help='licence of the weights (default: %(default)s)')
    args = parser.parse_args(argv)
    setup_default_logging()
    with exit_with_message(prog, RuntimeError):
        folder = export_checkpoint(
            args.checkpoint, args.folder, args.ema, dataset=args.dataset, license=args.license)
    print(f"timm.create_model('local-dir:{folder}', pretrained=True)")
