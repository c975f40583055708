"""A folder of images with every kind of harm, and what becomes of it:

    python -m tests.alignmix_lab.data.hostile --files 2000

Converts the folder without root's rights, compares what was kept and what was reported with what was put there,
verifies and damages the result, and trains two steps on it. The tests do the same with fewer files.
"""
import argparse
import contextlib
import ctypes
import io
import os
import struct
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

KEPT, UNREADABLE, SKIPPED = 'kept', 'unreadable', 'skipped'  # what should become of a file
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
CLASSES = [  # folder names as bytes: file systems know no encoding
    b'plain', '\u732b'.encode(), '\u043a\u043e\u0448\u043a\u0430'.encode(), '\u0642\u0637\u0629'.encode(),
    '\U0001f408 \u200d'.encode(), '1\u00b22'.encode(), b'a b\tc,"d";\'e\' $(f) `g` %s {h}', b'caf\xe9 \xff\xfe', b'-rf',
]
FILE_NAMES = [b'image', 'b\u00edld \u5716\u50cf'.encode(), b'\x80\x81', b'new\nline', b'x' * 200, b'%n%s']


def photo(rng: np.random.Generator) -> Image.Image:
    """A small picture that compresses as photographs do."""
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(tuple(rng.integers(24, 80, 2).tolist()), Image.Resampling.BICUBIC)


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: int | None = None, extra: bytes = b'') -> bytes:
    """A black PNG, written without its pixels ever being in memory; `rows` fewer than its header says."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    compress = zlib.compressobj(1)
    row = bytes(1 + (width * depth * (3 if colour == 2 else 1) + 7) // 8)
    pixels = b''.join(compress.compress(row) for _ in range(height if rows is None else rows)) + compress.flush()
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + extra + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')


def _text_bomb() -> bytes:
    content = b'Comment\0\0' + zlib.compress(bytes(1 << 26), 9)
    extra = struct.pack('>I', len(content)) + b'zTXt' + content + struct.pack('>I', zlib.crc32(b'zTXt' + content))
    return png(8, 8, 8, 2, extra=extra)


def _cut(content: bytes, share: float) -> bytes:
    return content[:int(len(content) * share)]


def _animation(image: Image.Image, file_format: str) -> bytes:
    frames = [image.rotate(90 * turn) for turn in (1, 2, 3)]
    return saved(image, file_format, save_all=True, append_images=frames, duration=50)


def _rotated(image: Image.Image, rng: np.random.Generator) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(1, 9))
    return saved(image, 'JPEG', exif=exif)


def _sixteen_bit(image: Image.Image) -> bytes:
    return saved(Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) << 8), 'PNG')


def _transparent_palette(image: Image.Image) -> bytes:
    return saved(image.quantize(16), 'PNG', transparency=bytes(range(0, 256, 16)))


# name: (extension, fate, content from a photo and a generator)
HARMS: dict[str, tuple[str, str, Callable[[Image.Image, np.random.Generator], bytes]]] = {
    'none': ('.jpg', KEPT, lambda i, r: saved(i, 'JPEG')),
    'upper-case extension': ('.JPEG', KEPT, lambda i, r: saved(i, 'JPEG')),
    'progressive': ('.jpg', KEPT, lambda i, r: saved(i, 'JPEG', progressive=True)),
    'PNG named .jpg': ('.jpg', KEPT, lambda i, r: saved(i, 'PNG')),
    'JPEG named .png': ('.png', KEPT, lambda i, r: saved(i, 'JPEG')),
    'WebP named .gif': ('.gif', KEPT, lambda i, r: saved(i, 'WEBP')),
    'CMYK JPEG': ('.jpg', KEPT, lambda i, r: saved(i.convert('CMYK'), 'JPEG')),
    'CMYK TIFF': ('.tif', KEPT, lambda i, r: saved(i.convert('CMYK'), 'TIFF', compression='tiff_lzw')),
    '16-bit grey': ('.png', KEPT, lambda i, r: _sixteen_bit(i)),
    '16-bit colour': ('.png', KEPT, lambda i, r: png(40, 30, 16, 2)),
    '1-bit': ('.png', KEPT, lambda i, r: saved(i.convert('1'), 'PNG')),
    'grey with alpha': ('.png', KEPT, lambda i, r: saved(i.convert('LA'), 'PNG')),
    'palette with transparency': ('.png', KEPT, lambda i, r: _transparent_palette(i)),
    'palette GIF': ('.gif', KEPT, lambda i, r: saved(i.quantize(8), 'GIF', transparency=0)),
    'animated GIF': ('.gif', KEPT, lambda i, r: _animation(i, 'GIF')),
    'animated WebP': ('.webp', KEPT, lambda i, r: _animation(i, 'WEBP')),
    'animated PNG': ('.png', KEPT, lambda i, r: _animation(i, 'PNG')),
    'EXIF rotation': ('.jpg', KEPT, lambda i, r: _rotated(i, r)),
    'damaged EXIF': ('.jpg', KEPT, lambda i, r: saved(i, 'JPEG', exif=b'Exif\0\0' + r.bytes(40))),
    'trailing bytes': ('.jpg', KEPT, lambda i, r: saved(i, 'JPEG') + r.bytes(100)),
    'cut JPEG': ('.jpg', UNREADABLE, lambda i, r: _cut(saved(i, 'JPEG'), r.uniform(0.1, 0.9))),
    'cut PNG': ('.png', UNREADABLE, lambda i, r: _cut(saved(i, 'PNG'), r.uniform(0.1, 0.9))),
    'cut WebP': ('.webp', UNREADABLE, lambda i, r: _cut(saved(i, 'WEBP'), r.uniform(0.1, 0.9))),
    'cut TIFF': ('.tiff', UNREADABLE, lambda i, r: _cut(saved(i, 'TIFF'), r.uniform(0.1, 0.9))),
    'cut BMP': ('.bmp', UNREADABLE, lambda i, r: _cut(saved(i, 'BMP'), r.uniform(0.1, 0.9))),
    'PNG with bad bytes': ('.png', UNREADABLE, lambda i, r: saved(i, 'PNG').replace(b'IDAT', b'IDAT' + r.bytes(8))),
    'zero bytes long': ('.jpg', UNREADABLE, lambda i, r: b''),
    'all zeros': ('.jpg', UNREADABLE, lambda i, r: bytes(3000)),
    'noise': ('.png', UNREADABLE, lambda i, r: r.bytes(3000)),
    'text': ('.jpg', UNREADABLE, lambda i, r: b'<html><body>404 Not Found</body></html>'),
    'PDF': ('.jpg', UNREADABLE, lambda i, r: b'%PDF-1.7\n' + r.bytes(500)),
    'EPS, which would start Ghostscript': ('.jpg', UNREADABLE, lambda i, r: saved(i, 'EPS')),
    'floating point': ('.tif', UNREADABLE, lambda i, r: saved(Image.new('F', (9, 9), 0.5), 'TIFF')),
    'one pixel': ('.png', UNREADABLE, lambda i, r: saved(Image.new('RGB', (1, 1)), 'PNG')),
    'other extension': ('.txt', SKIPPED, lambda i, r: saved(i, 'JPEG')),
    'no extension': ('', SKIPPED, lambda i, r: saved(i, 'JPEG')),
}

# The same, once in a folder: they take time or memory.
LARGE_HARMS = {
    '20,000 x 10,000 JPEG': ('.jpg', KEPT, lambda i, r: saved(Image.new('L', (20_000, 10_000)), 'JPEG')),
    '20,000 x 200 PNG': ('.png', KEPT, lambda i, r: png(20_000, 200, 8, 2)),
    '20,000 x 20,000 PNG': ('.png', UNREADABLE, lambda i, r: png(20_000, 20_000, 1, 0)),
    '20,000 x 2 PNG': ('.png', UNREADABLE, lambda i, r: png(20_000, 2, 8, 2)),
    'bomb: 60,000 x 60,000 PNG of a few bytes': ('.png', UNREADABLE, lambda i, r: png(60_000, 60_000, 8, 2, rows=9)),
    'bomb: 64 MiB of text in a PNG': ('.png', UNREADABLE, lambda i, r: _text_bomb()),
    'bomb: GIF canvas of 65,535 x 65,535': (
        '.gif', UNREADABLE, lambda i, r: b'GIF89a\xff\xff\xff\xff' + saved(i.quantize(8), 'GIF')[10:]),
}


def _special(folder: Path) -> Iterator[tuple[str, Path, str]]:
    """What is not a file with content: (name, place, fate)."""
    def place(name: str) -> Path:
        return folder / name

    place('nowhere.jpg').symlink_to('gone.jpg')
    yield 'link to nothing', place('nowhere.jpg'), UNREADABLE
    place('ring a.jpg').symlink_to('ring b.jpg')
    place('ring b.jpg').symlink_to('ring a.jpg')
    yield 'links to each other', place('ring a.jpg'), UNREADABLE
    yield 'links to each other', place('ring b.jpg'), UNREADABLE
    for name, target in (('self', '.'), ('self too', '.'), ('up', '..'), ('root', '../..')):
        place(name).symlink_to(target)
        yield 'link to a folder above', place(name), SKIPPED
    os.mkfifo(place('pipe.jpg'))
    yield 'pipe', place('pipe.jpg'), SKIPPED
    place('endless.jpg').symlink_to('/dev/zero')
    yield 'device', place('endless.jpg'), SKIPPED
    with open(place('huge.jpg'), 'wb') as file:
        file.truncate(2 << 30)
    yield '2 GiB of nothing', place('huge.jpg'), UNREADABLE
    image = saved(Image.new('RGB', (30, 30)), 'JPEG')
    place('forbidden.jpg').write_bytes(image)
    place('forbidden.jpg').chmod(0)
    yield 'no permission', place('forbidden.jpg'), UNREADABLE
    place('forbidden').mkdir()
    (place('forbidden') / 'image.jpg').write_bytes(image)
    place('forbidden').chmod(0)
    yield 'folder without permission', place('forbidden'), SKIPPED


def build(root: Path, count: int, seed: int = 0) -> dict[str, list[tuple[Path, str]]]:
    """Make root/train and root/val of `count` files together.

    Returns:
        {kind of harm: [(file, its fate)]}, of the training folder; all of root/val is sound.
    """
    rng = np.random.default_rng(seed)
    made: dict[str, list[tuple[Path, str]]] = {}
    folders = [root / 'train' / os.fsdecode(name) for name in CLASSES]
    for folder in folders:
        folder.mkdir(parents=True)
        (root / 'val' / folder.name).mkdir(parents=True)
        (root / 'val' / folder.name / 'image.jpg').write_bytes(saved(photo(rng), 'JPEG'))
    for kind, place, fate in _special(folders[0]):
        made.setdefault(kind, []).append((place, fate))
    written = len(CLASSES) + sum(map(len, made.values()))
    harms = [*LARGE_HARMS.items(), *(list(HARMS.items()) * (count // len(HARMS) + 1))]
    for index, (kind, (extension, fate, content)) in enumerate(harms[:count - written]):
        name = os.fsdecode(FILE_NAMES[index % len(FILE_NAMES)]) + f' {index}{extension}'
        place = folders[(index + index // len(HARMS)) % len(folders)] / name
        place.write_bytes(content(photo(rng), rng))
        made.setdefault(kind, []).append((place, fate))
    return made


@contextlib.contextmanager
def permissions_hold() -> Iterator[None]:
    """Lay down the capabilities by which root reads files that permit nobody to."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # capabilities(7), version 3; this thread and what it starts
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits

    def call(function: Callable) -> None:
        if function(header, sets):
            raise OSError(ctypes.get_errno(), 'the capabilities of this process cannot be changed')

    call(libc.capget)
    effective = sets[0]
    sets[0] = effective & ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
    call(libc.capset)
    try:
        yield
    finally:
        sets[0] = effective
        call(libc.capset)


def damage_found(path: Path, flips: int) -> int:
    """How many of single changed bytes in the images of a .beton verify finds; opening the file notices none."""
    from alignmix_lab.data.ffcv.beton import inspect_beton
    from alignmix_lab.data.ffcv.verify import verify_beton
    rng = np.random.default_rng(0)
    info = inspect_beton(path)
    found = 0
    for sample in rng.integers(0, info.num_samples, flips):
        place = int(info.pointers[sample] + rng.integers(0, info.sizes[sample]))
        with open(path, 'r+b') as file:
            file.seek(place)
            old = file.read(1)
            file.seek(place)
            file.write(bytes([old[0] ^ int(rng.integers(1, 256))]))
            file.flush()
            inspect_beton(path)
            found += sample in verify_beton(path, progress=False)
            file.seek(place)
            file.write(old)
    return found


def train_two_steps(folder: Path) -> list[float]:
    """Losses of a tiny model on a converted folder."""
    import timm
    import torch

    from alignmix_lab.data import create_loaders
    from timm_alignmix import MixTask
    loaders = create_loaders(str(folder), loader='ffcv', input_size=(3, 32, 32), batch_size=8, workers=2)
    task = MixTask(timm.create_model('test_resnet', num_classes=loaders.num_classes), 'alignmix', verbose=False)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.01)
    losses = []
    for images, labels in loaders.train:
        loss = task(images, labels)['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) == 2:
            return losses


def main() -> None:
    """Run all of it and print the figures."""
    from alignmix_lab.data import convert
    from alignmix_lab.data.ffcv.verify import verify_beton
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--files', type=int, default=2000, metavar='N')
    parser.add_argument('--workers', type=int, default=2, metavar='N')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix='hostile ') as folder:
        folder = Path(folder)
        with permissions_hold():
            begin = time.perf_counter()
            made = build(folder / 'images', args.files)
            built = time.perf_counter()
            report, _ = convert(str(folder / 'images'), folder / 'out', workers=args.workers, progress=False)
            converted = time.perf_counter()
        fates = {str(place): UNREADABLE for place, *_ in report.unreadable}
        fates.update((place, SKIPPED) for place, _ in report.skipped)
        print(f'{args.files} files made in {built - begin:.1f} s, converted in {converted - built:.1f} s')
        wrong = 0
        for kind, entries in made.items():
            became = Counter(fates.get(str(place), KEPT) for place, _ in entries)
            wrong += sum(fates.get(str(place), KEPT) != fate for place, fate in entries)
            print(f'{kind:45} ' + ', '.join(f'{number} {fate}' for fate, number in became.items()))
        print(f'{report.num_samples} images kept, {len(report.unreadable)} unreadable, {len(report.skipped)} skipped, '
              f'{wrong} otherwise than expected')
        damaged = len(verify_beton(report.path, progress=False))
        print(f'verify: {damaged} damaged; of 200 changed bytes found: {damage_found(report.path, 200)}')
        print(f'losses of two steps: {train_two_steps(folder / "out")}')


if __name__ == '__main__':
    main()
