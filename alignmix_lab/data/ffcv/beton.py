"""Writing and checking of FFCV's .beton files (format 2).

FFCV's own DatasetWriter waits forever if one of its workers fails, and its reader accepts any bytes as a dataset. Here
a single writer appends samples that workers have encoded, so that failures are exceptions, the file does not depend on
the number of workers, and unreadable samples are simply not appended. Field types and record layouts are FFCV's.
"""
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .importing import import_ffcv

IMAGE, LABEL = 'image', 'label'
MIN_PAGE_SIZE = 8 << 20  # FFCV's default: four huge pages
CONVERT = 'write it again with: python -m alignmix_lab convert --data-dir IMAGES --output FOLDER'


class EncodedSample(NamedTuple):
    """One sample as it is stored."""
    image_record: bytes  # FFCV's metadata of the image; the writer fills in the data pointer
    payload: bytes  # JPEG file or raw pixels
    label: int


def _fields() -> dict:
    ffcv = import_ffcv()
    return {IMAGE: ffcv.fields.rgb_image.RGBImageField(), LABEL: ffcv.fields.basics.IntField()}


def encode_sample(pixels: np.ndarray, label: int, as_jpeg: bool, jpeg_quality: int) -> EncodedSample:
    """Encode an image (H, W, 3) uint8 with FFCV's image field: as raw pixels unless a JPEG is wanted and no larger."""
    field_type = import_ffcv().fields.rgb_image.RGBImageField
    for mode in ('jpg', 'raw') if as_jpeg else ('raw',):
        field = field_type(write_mode=mode, jpeg_quality=jpeg_quality)
        record = np.zeros(1, dtype=field.metadata_type)
        stored = []

        def malloc(size: int, stored: list = stored) -> tuple[int, np.ndarray]:
            stored.append(np.empty(size, dtype=np.uint8))
            return 0, stored[-1]

        field.encode(record[0], pixels, malloc)
        if stored[0].nbytes <= pixels.nbytes:
            break
    return EncodedSample(record.tobytes(), stored[0].tobytes(), int(label))


def page_size_for(max_side: int) -> int:
    """Smallest page that holds any image with this longer side; samples may not cross page borders."""
    page_size = MIN_PAGE_SIZE
    while page_size < 3 * max_side ** 2:
        page_size *= 2
    if page_size >= 1 << 32:
        raise ValueError(f'images of {max_side} pixels do not fit in an FFCV page; use --max-resolution 32768 or less')
    return page_size


class BetonWriter:
    """Sequential writer of one .beton file of at most `capacity` samples; the page size in bytes is a power of two."""

    def __init__(self, path: Path, capacity: int, page_size: int = MIN_PAGE_SIZE):
        self._types = import_ffcv().types
        self._fields = _fields()
        self._sample_type = self._types.get_metadata_type(list(self._fields.values()))
        self._capacity = capacity
        self._page_size = page_size
        index_size = self._types.HeaderType.itemsize + len(self._fields) * self._types.FieldDescType.itemsize
        index_size += capacity * self._sample_type.itemsize
        self._data_start = -(-index_size // page_size) * page_size
        self._page = bytearray()
        self._page_crcs: list[int] = []
        self._records: list[tuple[bytes, int]] = []
        self._regions: list[tuple[int, int, int]] = []
        self._file = open(path, 'wb')
        self._file.seek(self._data_start)

    def append(self, sample: EncodedSample) -> None:
        """Append a sample; its index is the number of samples before it."""
        if len(self._records) == self._capacity:
            raise ValueError(
                f'the dataset yields more than the {self._capacity} samples it announced; state the right number '
                "(webdataset splits: 'name-{0000..0099}.tar|NUMBER')")
        if len(self._page) + len(sample.payload) > self._page_size:
            self._page.extend(bytes(self._page_size - len(self._page)))
            self._flush_page()
        pointer = self._data_start + len(self._page_crcs) * self._page_size + len(self._page)
        self._regions.append((len(self._records), pointer, len(sample.payload)))
        self._records.append((sample.image_record, sample.label))
        self._page.extend(sample.payload)

    def _flush_page(self) -> None:
        self._file.write(self._page)
        self._page_crcs.append(zlib.crc32(self._page))
        self._page.clear()

    def close(self) -> dict:
        """Finish the file and return its checksums.

        Returns:
            {'size', 'head', 'data_start', 'page_size', 'pages', 'table'}: sizes in bytes and CRC-32 values of the part
            before the pages, of every page, and of the allocation table.
        """
        if self._page:
            self._flush_page()
        table = np.array(self._regions, dtype=self._types.ALLOC_TABLE_TYPE).tobytes()
        table_start = self._file.tell()
        self._file.write(table)
        size = self._file.tell()
        head = self._head(table_start)
        self._file.seek(0)
        self._file.write(head)
        self._file.close()
        return {
            'size': size, 'head': zlib.crc32(head), 'data_start': self._data_start, 'page_size': self._page_size,
            'pages': self._page_crcs, 'table': zlib.crc32(table),
        }

    def abort(self) -> None:
        self._file.close()

    def _head(self, table_start: int) -> bytes:
        header = np.zeros(1, dtype=self._types.HeaderType)
        header['version'] = self._types.CURRENT_VERSION
        header['num_fields'] = len(self._fields)
        header['page_size'] = self._page_size
        header['num_samples'] = len(self._records)
        header['alloc_table_ptr'] = table_start
        type_ids = {handler: type_id for type_id, handler in self._types.TYPE_ID_HANDLER.items()}
        descriptors = np.zeros(len(self._fields), dtype=self._types.FieldDescType)
        for descriptor, (name, field) in zip(descriptors, self._fields.items(), strict=True):
            descriptor['type_id'] = type_ids[type(field)]
            descriptor['name'][:len(name)] = np.frombuffer(name.encode('ascii'), dtype=np.uint8)
            descriptor['arguments'][:] = field.to_binary()[0]
        samples = np.zeros(len(self._records), dtype=self._sample_type)
        images = b''.join(record for record, _ in self._records)
        samples['f0'] = np.frombuffer(images, dtype=self._sample_type['f0'])
        samples['f0']['data_ptr'] = [pointer for _, pointer, _ in self._regions]
        samples['f1'] = [label for _, label in self._records]
        head = header.tobytes() + descriptors.tobytes() + samples.tobytes()
        return head.ljust(self._data_start, b'\0')


def sidecar_path(path: Path) -> Path:
    """JSON file beside a .beton with class names, source, settings and checksums."""
    return path.with_name(path.name + '.json')


@dataclass(frozen=True)
class BetonInfo:
    """Index and description of a .beton file."""
    path: Path
    labels: np.ndarray  # (N,) int64
    heights: np.ndarray  # (N,) pixels
    widths: np.ndarray  # (N,) pixels
    is_jpeg: np.ndarray  # (N,) bool
    pointers: np.ndarray  # (N,) byte offset of each image
    sizes: np.ndarray  # (N,) bytes of each image
    page_size: int
    class_names: list[str] | None  # None without a JSON file beside it
    sidecar: dict

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return max(len(self.class_names or []), int(self.labels.max()) + 1)

    @property
    def pages(self) -> np.ndarray:
        """(N,) page number of each image."""
        return self.pointers // self.page_size


def inspect_beton(path: str | Path) -> BetonInfo:
    """Read the index of a .beton file and check that it is complete and holds images with integer labels.

    The index is compared with the checksums beside the file, if there are any. Damage inside the pages needs a full
    read: `python -m alignmix_lab verify FILE`.

    Raises:
        ValueError: The file is missing, of another format, truncated, inconsistent, or has other fields.
    """
    path = Path(path)
    types = import_ffcv().types
    if not path.is_file():
        raise ValueError(f'{path} does not exist; {CONVERT}')
    file_size = path.stat().st_size
    with open(path, 'rb') as file:
        def read(dtype: np.dtype, count: int, offset: int) -> np.ndarray:
            if offset + count * dtype.itemsize > file_size:
                raise ValueError(f'{path} is cut short ({file_size} bytes); {CONVERT}')
            file.seek(offset)
            return np.frombuffer(file.read(count * dtype.itemsize), dtype=dtype)

        header = read(types.HeaderType, 1, 0)[0]
        if header['version'] != types.CURRENT_VERSION or not 0 < header['num_fields'] < 256:
            raise ValueError(
                f'{path} is not a .beton file of format {types.CURRENT_VERSION} (it says {header["version"]}), '
                f'which this FFCV reads; {CONVERT}')
        descriptors = read(types.FieldDescType, int(header['num_fields']), types.HeaderType.itemsize)
        names = [bytes(name).split(b'\0')[0].decode('ascii', 'replace') for name in descriptors['name']]
        expected = [type(field) for field in _fields().values()]
        handlers = [types.TYPE_ID_HANDLER.get(int(type_id)) for type_id in descriptors['type_id']]
        if names != [IMAGE, LABEL] or handlers != expected:
            raise ValueError(
                f"{path} has the fields {names}; expected an RGB '{IMAGE}' and an integer '{LABEL}'; {CONVERT}")
        sample_type = types.get_metadata_type(list(_fields().values()))
        index_start = types.HeaderType.itemsize + descriptors.nbytes
        samples = read(sample_type, int(header['num_samples']), index_start)
        table_start = int(header['alloc_table_ptr'])
        table_size = types.ALLOC_TABLE_TYPE.itemsize * len(samples)
        if table_start + table_size != file_size or table_start < index_start + samples.nbytes:
            raise ValueError(f'{path} is cut short or damaged: {file_size} bytes, '
                             f'expected {table_start + table_size}; {CONVERT}')
        table = read(types.ALLOC_TABLE_TYPE, len(samples), table_start)
    if not len(samples):
        raise ValueError(f'{path} holds no samples; {CONVERT}')
    table = table[np.argsort(table['ptr'])]
    images = samples['f0']
    place = np.minimum(np.searchsorted(table['ptr'], images['data_ptr']), len(table) - 1)
    sizes = table['size'][place].astype(np.int64)
    pixels = 3 * images['height'].astype(np.int64) * images['width']
    page_size = int(header['page_size'])
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f'{path} is damaged: pages of {page_size} bytes, which is no power of two; {CONVERT}')
    consistent = (
        (table['ptr'][place] == images['data_ptr']) & (images['data_ptr'].astype(np.int64) + sizes <= table_start)
        & (pixels > 0) & (images['mode'] <= 1) & ((images['mode'] == 0) | (sizes == pixels)) & (samples['f1'] >= 0)
    )
    if not consistent.all():
        raise ValueError(f'{path} is damaged: the index entries of {np.sum(~consistent)} samples, '
                         f'the first of them {np.argmin(consistent)}, make no sense; {CONVERT}')
    sidecar = _read_sidecar(path, len(samples), file_size)
    if sidecar:
        _check_index(path, sidecar['checksums'], table_start)
    return BetonInfo(
        path=path,
        labels=samples['f1'].astype(np.int64),
        heights=images['height'].astype(np.int64),
        widths=images['width'].astype(np.int64),
        is_jpeg=images['mode'] == 0,
        pointers=images['data_ptr'].astype(np.int64),
        sizes=sizes,
        page_size=page_size,
        class_names=sidecar.get('class_names'),
        sidecar=sidecar,
    )


def _read_sidecar(path: Path, num_samples: int, file_size: int) -> dict:
    sidecar = sidecar_path(path)
    if not sidecar.exists():
        return {}
    try:
        content = json.loads(sidecar.read_text(encoding='utf-8'))
        checksums = content['checksums']
        described = content['num_samples'], checksums['size']
        whole = all(isinstance(checksums[name], int) for name in ('head', 'data_start', 'page_size', 'table'))
        if not whole or not isinstance(checksums['pages'], list):
            raise TypeError('checksums that are no numbers')
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{sidecar} is not the description of a .beton file ({error!r}); {CONVERT}') from error
    if described != (num_samples, file_size):
        raise ValueError(
            f'{sidecar} describes {described[0]} samples in {described[1]} bytes, but {path.name} has {num_samples} in '
            f'{file_size}: the two do not belong together; {CONVERT}')
    return content


def _check_index(path: Path, checksums: dict, table_start: int) -> None:
    with open(path, 'rb') as file:
        head = zlib.crc32(file.read(checksums['data_start']))
        file.seek(table_start)
        if (head, zlib.crc32(file.read())) != (checksums['head'], checksums['table']):
            raise ValueError(f'{path}: the index (labels and offsets) is damaged; copy the file again, or {CONVERT}')
