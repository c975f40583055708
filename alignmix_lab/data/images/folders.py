"""ImageFolder roots: folders of the splits, their images, and the files that are skipped.

timm's own scan follows symbolic links endlessly, silently skips unreadable folders, opens pipes and devices named like
images, and fails on some digits in names ('1\\u00b22.jpg'). Labels and order are timm's.
"""
import collections
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from PIL import features
from timm.data.readers.reader_image_folder import ReaderImageFolder

_logger = logging.getLogger(__name__)

EXTENSIONS = (
    *(('.avif',) if features.check('avif') else ()),
    '.bmp', '.gif', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp',
)
_HINTS = {
    '.avif': 'this Pillow was built without AVIF; install 11.3 or newer',
    '.heic': 'Pillow does not read it; convert to JPEG, e.g. with heif-convert',
    '.heif': 'Pillow does not read it; convert to JPEG, e.g. with heif-convert',
}
TRAIN_FOLDERS = ('train', 'training')
EVAL_FOLDERS = ('validation', 'val', 'valid', 'eval', 'evaluation', 'test')


class Skipped(NamedTuple):
    """A file or folder of a split that is not read."""
    name: str
    reason: str


def split_names(split: str) -> list[str]:
    """Names that a split goes by, its own first."""
    return list(dict.fromkeys(
        [split, *(name for names in (TRAIN_FOLDERS, EVAL_FOLDERS) if split in names for name in names)]))


def find_split_folder(root: str | Path, split: str) -> Path:
    """Find the folder of a split in an ImageFolder root; the usual names of training or evaluation are synonyms.

    Raises:
        ValueError: The root or the folder is missing; the message lists the folders there are.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(f'data folder {root} does not exist' if not root.exists() else f'{root} is not a folder')
    names = split_names(split)
    for name in names:
        if name and (root / name).is_dir():
            if name != split:
                _logger.info(f'Split {split!r}: using the folder {root / name}')
            return root / name
    there = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    raise ValueError(
        f'{root} has no folder for the split {split!r} (tried {", ".join(names)}); it has: '
        f'{", ".join(there[:20]) or "no folders"}. Expected {root}/train/<class>/ and {root}/validation/<class>/'
        + ('; without validation images, --val-share 0.1 sets a tenth of the training images aside'
           if split in EVAL_FOLDERS else ''))


class FolderReader(ReaderImageFolder):
    """timm's class-per-folder reader, with a scan that survives any content.

    Args:
        root: Folder of a split.
        class_to_idx: Labels by folder name; other folders are left out. None takes all folders, in natural order.

    Attributes:
        samples: (file name, label) of every image, in natural order.
        skipped: Files and folders that are not read, with reasons.

    Raises:
        ValueError: There are no images.
    """

    def __init__(self, root: str, class_to_idx: dict[str, int] | None = None):
        self.root = root
        files, self.skipped = list_images(root)
        classes = [os.path.basename(os.path.dirname(os.path.relpath(file, root))) for file in files]
        if class_to_idx is None:
            class_to_idx = {name: index for index, name in enumerate(sorted(set(classes), key=natural))}
        self.class_to_idx = class_to_idx
        self.samples = [
            (file, class_to_idx[name]) for file, name in zip(files, classes, strict=True) if name in class_to_idx]
        if not self.samples:
            raise ValueError(f'no images in the class folders of {root} (extensions {", ".join(EXTENSIONS)})')


def natural(name: str) -> list[int | str]:
    """Natural sort key: 'a10' after 'a9'. Every second part is a number, so that any two keys compare."""
    parts = re.split(r'(\d+)', name.lower())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def list_images(root: str) -> tuple[list[str], list[Skipped]]:
    """List the images below a folder by their extension, in natural order, and everything that is skipped.

    Symbolic links are followed after all real folders, unless they lead to a folder already listed or to one that
    contains `root`.
    """
    files: list[str] = []
    skipped: list[Skipped] = []
    links: collections.deque[str] = collections.deque()
    listed: dict[tuple[int, int], str] = {}
    real_root = os.path.realpath(root)

    def visit(top: str) -> None:
        folders = [top]
        while folders:
            folder = folders.pop()
            try:
                status = os.stat(folder)
                first = listed.setdefault((status.st_dev, status.st_ino), folder)
                if first != folder:
                    skipped.append(Skipped(folder, f'the same folder as {first!r}, through a symbolic link'))
                    continue
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                        elif entry.is_symlink() and os.path.isdir(entry.path):
                            links.append(entry.path)
                        elif reason := _reason_to_skip(entry):
                            skipped.append(Skipped(entry.path, reason))
                        else:
                            files.append(entry.path)
            except OSError as error:  # no permission, a name too long, a failing disk
                skipped.append(Skipped(folder, f'a folder that cannot be listed ({error.strerror})'))

    visit(root)
    while links:
        link = links.popleft()
        if f'{real_root}{os.sep}'.startswith(f'{os.path.realpath(link)}{os.sep}'):
            skipped.append(Skipped(link, f'a symbolic link to a folder that contains {root!r}'))
        else:
            visit(link)
    return sorted(files, key=natural), sorted(skipped)


def _reason_to_skip(entry: os.DirEntry) -> str:
    """Reason to skip a file, or ''. Broken links are listed: reading them reports the error."""
    extension = os.path.splitext(entry.name)[1]
    if extension.lower() not in EXTENSIONS:
        hint = _HINTS.get(extension.lower())
        return f'the extension {extension!r} is not read' + (f': {hint}' if hint else '')
    if not os.path.isfile(entry.path) and os.path.exists(entry.path):
        return 'not a regular file'  # reading a pipe would wait forever
    return ''


def check_folders(reader: FolderReader) -> None:
    """Check that every class folder has images and that all images are in class folders.

    Raises:
        ValueError: The message names the folders or images.
    """
    folder = Path(reader.root)
    places = [os.path.relpath(os.path.dirname(name), folder).split(os.sep)[0] for name, _ in reader.samples]
    if '.' in places:
        raise ValueError(f'images lie directly in {folder}, such as {reader.samples[places.index(".")][0]}; '
                         'expected one folder per class')
    folders = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith('.')}
    empty = sorted(folders - set(places))
    if empty:
        reasons = '; '.join(f'{name}: {reason}' for name, reason in reader.skipped if os.path.basename(name) in empty)
        raise ValueError(
            f'{len(empty)} class folders in {folder} have no images that can be listed ({", ".join(EXTENSIONS)}): '
            f'{", ".join(empty[:20])}; fill them or remove them' + (f' ({reasons})' if reasons else ''))


def log_skipped(reader: FolderReader) -> None:
    """Warn about skipped files and folders."""
    if not reader.skipped:
        return
    shown = '; '.join(f'{name!r}: {reason}' for name, reason in reader.skipped[:5])  # any bytes may be in a name
    more = '; ...' if len(reader.skipped) > 5 else ''
    _logger.warning(f'{reader.root}: {len(reader.skipped)} files or folders are skipped ({shown}{more})')
