"""Files that must be refused, and damage that must be found."""
import json
import shutil

import numpy as np
import pytest

pytest.importorskip('ffcv', reason='FFCV is not installed')

import ffcv.writer  # noqa: E402
from ffcv.fields import FloatField, IntField, RGBImageField  # noqa: E402

from alignmix_lab.commands import verify  # noqa: E402
from alignmix_lab.data.ffcv.beton import inspect_beton, sidecar_path  # noqa: E402
from alignmix_lab.data.ffcv.verify import verify_beton  # noqa: E402


@pytest.fixture
def beton(tmp_path, betons):
    """A copy to do harm to."""
    for name in ('val.beton', 'val.beton.json'):
        shutil.copy(betons / name, tmp_path / name)
    return tmp_path / 'val.beton'


def overwrite(path, offset, content):
    with open(path, 'r+b') as file:
        file.seek(offset)
        file.write(content)


@pytest.fixture(scope='module')
def foreign(tmp_path_factory, crops):
    """A file written by FFCV itself, without anything beside it."""
    path = tmp_path_factory.mktemp('foreign') / 'train.beton'
    fields = {'image': RGBImageField(write_mode='jpg'), 'label': IntField()}
    writer = ffcv.writer.DatasetWriter(str(path), fields, num_workers=1)
    writer.from_indexed_dataset([(np.asarray(image), label) for label, image in enumerate(crops)])
    return path


@pytest.mark.parametrize('size', [0, 10, 24, 2000, 3000, 8_400_000])
def test_files_cut_short_are_refused(beton, size):
    beton.write_bytes(beton.read_bytes()[:size])
    with pytest.raises(ValueError, match=r'val.beton is cut short.*alignmix_lab convert'):
        inspect_beton(beton)


def test_files_cut_at_the_very_end_are_refused(beton):
    beton.write_bytes(beton.read_bytes()[:-1])
    with pytest.raises(ValueError, match='cut short or damaged'):
        inspect_beton(beton)


def test_other_formats_are_refused(beton, tmp_path):
    overwrite(beton, 0, b'\x03\x00')
    with pytest.raises(ValueError, match=r'not a .beton file of format 2 \(it says 3\)'):
        inspect_beton(beton)
    (tmp_path / 'text.beton').write_text('The quick brown fox jumps over the lazy dog')
    with pytest.raises(ValueError, match='not a .beton file'):
        inspect_beton(tmp_path / 'text.beton')
    with pytest.raises(ValueError, match='none.beton does not exist'):
        inspect_beton(tmp_path / 'none.beton')


def test_other_fields_are_refused(tmp_path):
    path = tmp_path / 'numbers.beton'
    writer = ffcv.writer.DatasetWriter(str(path), {'x': FloatField(), 'y': IntField()}, num_workers=1)
    writer.from_indexed_dataset([(0.5, 1), (0.25, 2)])
    with pytest.raises(ValueError, match=r"fields \['x', 'y'\]; expected an RGB 'image' and an integer 'label'"):
        inspect_beton(path)


def test_an_impossible_index_is_refused(beton):
    content = beton.read_bytes()
    pointer = int(inspect_beton(beton).pointers[3]).to_bytes(8, 'little')
    overwrite(beton, content.index(pointer), (1 << 40).to_bytes(8, 'little'))
    with pytest.raises(ValueError, match='index entries of 1 samples, the first of them 3, make no sense'):
        inspect_beton(beton)


def test_a_description_of_another_file_is_refused(beton):
    description = json.loads(sidecar_path(beton).read_text())
    sidecar_path(beton).write_text(json.dumps({**description, 'num_samples': 12}))
    with pytest.raises(ValueError, match='describes 12 samples in .* bytes, but val.beton has 11'):
        inspect_beton(beton)
    checksums = description['checksums']
    without, no_number = {k: v for k, v in checksums.items() if k != 'pages'}, {**checksums, 'data_start': None}
    for content in ({}, {**description, 'checksums': without}, {**description, 'checksums': no_number}):
        sidecar_path(beton).write_text(json.dumps(content))
        with pytest.raises(ValueError, match='is not the description of a .beton file'):
            inspect_beton(beton)


def test_a_file_of_ffcv_itself_is_accepted(foreign, crops):
    info = inspect_beton(foreign)
    assert info.labels.tolist() == list(range(len(crops)))
    assert [*zip(info.widths, info.heights, strict=True)] == [image.size for image in crops]
    assert info.is_jpeg.all() and info.class_names is None


def test_verify_names_the_samples_of_a_damaged_page(beton, caplog):
    assert verify_beton(beton, progress=False) == []
    info = inspect_beton(beton)
    overwrite(beton, int(info.pointers[4]) + 100, b'damage')
    assert verify_beton(beton, progress=False) == list(range(11))  # one page holds them all
    with pytest.raises(SystemExit, match='1'):
        verify.main([str(beton)])
    assert '11 samples may be damaged (0, 1, 2' in caplog.text


def test_verify_finds_a_changed_label(beton):
    content = beton.read_bytes()
    pointer = int(inspect_beton(beton).pointers[3]).to_bytes(8, 'little')
    overwrite(beton, content.index(pointer) + 8, (7).to_bytes(8, 'little'))
    with pytest.raises(ValueError, match='val.beton: the index .* is damaged; .*alignmix_lab convert'):
        verify_beton(beton, progress=False)
    with pytest.raises(ValueError, match='the index .* is damaged'):  # before a run begins, too
        inspect_beton(beton)


@pytest.mark.parametrize('described', [True, False])
@pytest.mark.parametrize('size', [0, 3 << 20])
def test_an_impossible_page_size_is_refused(beton, size, described):
    if not described:
        sidecar_path(beton).unlink()
    overwrite(beton, 4, size.to_bytes(4, 'little'))
    with pytest.raises(ValueError, match=f'val.beton is damaged: pages of {size} bytes.*alignmix_lab convert'):
        inspect_beton(beton)


def test_every_changed_byte_of_the_head_is_found(beton):
    whole = beton.read_bytes()
    for place in [*range(24), 30, 40, 1000, 1100, 2100, 2200, len(whole) - 5]:
        overwrite(beton, place, bytes([whole[place] ^ 1]))
        with pytest.raises(ValueError, match='val.beton.*alignmix_lab convert'):
            inspect_beton(beton)
        overwrite(beton, place, whole[place:place + 1])
    assert inspect_beton(beton).num_samples == 11


def test_verify_decodes_files_without_checksums(foreign, tmp_path):
    path = tmp_path / 'train.beton'
    shutil.copy(foreign, path)
    assert verify_beton(path, progress=False) == []
    info = inspect_beton(path)
    overwrite(path, int(info.pointers[7]), bytes(int(info.sizes[7])))
    assert verify_beton(path, progress=False) == [7]
    with pytest.raises(SystemExit, match='1'):
        verify.main([str(path)])
