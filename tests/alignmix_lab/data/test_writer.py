"""The converter, against FFCV's own reader and Pillow."""
import io
import os
import resource

import numpy as np
import pytest
import torch.utils.data
from PIL import Image

pytest.importorskip('ffcv', reason='FFCV is not installed')

from ffcv.reader import Reader  # noqa: E402

from alignmix_lab.commands.convert import main  # noqa: E402
from alignmix_lab.data import WriteSettings, convert, open_source, write_beton  # noqa: E402
from alignmix_lab.data.ffcv.beton import BetonWriter, encode_sample, inspect_beton  # noqa: E402
from alignmix_lab.data.images.sources import ImageSource  # noqa: E402

RAW = WriteSettings(write_mode='raw')


def stored_images(path):
    """(pixels, label) of each sample, through FFCV's reader and Pillow."""
    reader = Reader(str(path))
    content = path.read_bytes()
    sizes = dict(zip(reader.alloc_table['ptr'], reader.alloc_table['size'], strict=True))
    for image, label in zip(reader.metadata['f0'], reader.metadata['f1'], strict=True):
        start = int(image['data_ptr'])
        payload = content[start:start + int(sizes[image['data_ptr']])]
        shape = int(image['height']), int(image['width']), 3
        if image['mode'] == 0:
            pixels = np.asarray(Image.open(io.BytesIO(payload)))
        else:
            pixels = np.frombuffer(payload, np.uint8).reshape(shape)
        assert pixels.shape == shape
        yield pixels, int(label)


def test_images_and_labels_come_back(betons, numbered, area_average):
    for split, name in (('train', 'train.beton'), ('val', 'val.beton')):
        labels = []
        is_jpeg = inspect_beton(betons / name).is_jpeg
        for (pixels, label), lossy in zip(stored_images(betons / name), is_jpeg, strict=True):
            original = np.asarray(Image.open(numbered / split / f'{label:02d}' / 'image.jpg'))
            expected = area_average(original, pixels.shape[:2])
            assert max(pixels.shape) == min(160, max(original.shape))
            assert np.abs(pixels - expected).mean() < (8 if lossy else 0.6)
            labels.append(label)
        assert sorted(labels) == list(range(len(labels)))
        assert (labels == sorted(labels)) == (split == 'val')  # only the training file is shuffled


def test_about_half_of_the_images_are_jpeg(betons):
    info = inspect_beton(betons / 'train.beton')
    assert 8 <= info.is_jpeg.sum() <= 29  # 37 fair coins; fixed by the seed
    assert info.class_names == [f'{index:02d}' for index in range(37)]
    assert max(info.heights.max(), info.widths.max()) == 160


def test_raw_files_hold_the_exact_pixels(tmp_path, numbered):
    write_beton(open_source(str(numbered), split='val'), tmp_path / 'a.beton', RAW, workers=0, progress=False)
    for pixels, label in stored_images(tmp_path / 'a.beton'):
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(numbered / 'val' / f'{label:02d}' / 'image.jpg')))


def test_the_file_does_not_depend_on_the_number_of_workers(tmp_path, numbered):
    source = open_source(str(numbered), split='train')
    for workers in (0, 2):
        write_beton(source, tmp_path / f'{workers}.beton', workers=workers, shuffle=True, progress=False)
    assert (tmp_path / '0.beton').read_bytes() == (tmp_path / '2.beton').read_bytes()


def test_images_left_out_are_said_and_counted(tmp_path, crops, caplog):
    folder = tmp_path / 'images' / 'train' / 'a'
    folder.mkdir(parents=True)
    crops[0].save(folder / 'good.jpg')
    (folder / 'empty.jpg').touch()
    (folder / 'notes.txt').touch()
    report, = convert(str(tmp_path / 'images'), tmp_path / 'out', val_split='', workers=0, progress=False)
    assert (report.num_samples, len(report.unreadable), len(report.skipped)) == (1, 1, 1)
    assert '1 images could not be read and were left out' in caplog.text
    assert f"'{folder}/empty.jpg': ValueError: not an image in any supported format" in caplog.text
    assert '1 files or folders are skipped' in caplog.text


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    (tmp_path / 'train' / 'a' / 'x.jpg').touch()
    with pytest.raises(RuntimeError, match='none of the 1 images'):
        convert(str(tmp_path), tmp_path / 'out', val_split='', workers=0, progress=False)
    assert list((tmp_path / 'out').iterdir()) == []


class Broken(ImageSource):
    """A source whose worker fails at one sample, in a way that is not the image's fault."""

    def __init__(self, source, fail):
        super().__init__(source.dataset, source.title, source.class_names)
        self.fail = fail

    def read(self, index):
        if index == 5:
            self.fail()
        return super().read(index)


def raise_bug():
    raise KeyError('a bug in the reader')


@pytest.mark.parametrize('fail, error', [(raise_bug, KeyError), (lambda: os._exit(9), RuntimeError)])
def test_a_failing_worker_ends_the_run_and_keeps_the_old_file(tmp_path, numbered, fail, error):
    path = tmp_path / 'a.beton'
    path.write_text('the file of an earlier run')
    source = Broken(open_source(str(numbered), split='train'), fail)
    with pytest.raises(error, match='a bug in the reader|exited unexpectedly'):
        write_beton(source, path, workers=2, progress=False)
    assert path.read_text() == 'the file of an earlier run'
    assert [entry.name for entry in tmp_path.iterdir()] == ['a.beton']


def test_a_full_disk_ends_the_run_and_keeps_the_old_file(tmp_path, numbered):
    path = tmp_path / 'a.beton'
    path.write_text('the file of an earlier run')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match='File too large'):
            write_beton(open_source(str(numbered), split='train'), path, workers=0, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == 'the file of an earlier run'
    assert [entry.name for entry in tmp_path.iterdir()] == ['a.beton']


def test_no_sample_crosses_a_page(tmp_path):
    rng = np.random.default_rng(0)
    writer = BetonWriter(tmp_path / 'a.beton', capacity=200, page_size=1 << 14)
    for label in range(100):  # half the capacity is never used
        pixels = rng.integers(0, 256, (*rng.integers(2, 70, 2), 3), dtype=np.uint8)
        writer.append(encode_sample(pixels, label, as_jpeg=label % 2 == 0, jpeg_quality=90))
    writer.close()
    info = inspect_beton(tmp_path / 'a.beton')
    np.testing.assert_array_equal(info.pages, (info.pointers + info.sizes - 1) // info.page_size)
    assert len(set(info.pages)) > 10
    assert [label for _, label in stored_images(tmp_path / 'a.beton')] == list(range(100))


class Stream(torch.utils.data.IterableDataset):
    """Stands for timm's streams: announces a number of samples, gives another."""

    def __init__(self, images, announced):
        self.images = images
        self.reader = self
        self.num_samples = announced

    def set_loader_cfg(self, num_workers):
        pass

    def __iter__(self):
        return iter(zip(self.images, range(len(self.images)), strict=True))


def test_streams_are_written_in_sequence(tmp_path, crops, caplog):
    report = write_beton(ImageSource(Stream(crops[:5], 7), 's'), tmp_path / 'a.beton', RAW, workers=0, progress=False)
    assert report.num_samples == 5
    assert 's announced 7 samples but did not yield 2 of them' in caplog.text
    for pixels, label in stored_images(tmp_path / 'a.beton'):
        np.testing.assert_array_equal(pixels, np.asarray(crops[label]))
    with pytest.raises(ValueError, match='more than the 4 samples it announced'):
        write_beton(ImageSource(Stream(crops[:5], 4), 's'), tmp_path / 'b.beton', RAW, workers=0, progress=False)
    with pytest.raises(ValueError, match='does not say how many samples'):
        write_beton(ImageSource(Stream(crops[:5], 0), 's'), tmp_path / 'b.beton', RAW, workers=0, progress=False)


@pytest.mark.parametrize('settings, message', [
    ({'write_mode': 'smart'}, "write mode 'smart' is unknown"),
    ({'max_resolution': 1}, '--max-resolution 1 is too small'),
    ({'compress_probability': 1.5}, '--compress-probability 1.5'),
    ({'jpeg_quality': 0}, '--jpeg-quality 0'),
])
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        WriteSettings(**settings)


def test_command(tmp_path, numbered, caplog, capsys):
    caplog.set_level('INFO')
    command = ['--data-dir', str(numbered), '--output', str(tmp_path), '--workers', '0', '--max-resolution', '64']
    main(command)
    assert inspect_beton(tmp_path / 'val.beton').num_samples == 11
    with pytest.raises(SystemExit, match='train.beton exists; pass --overwrite to replace it'):
        main(command)
    main([*command, '--overwrite', '--train-split', ''])
    with pytest.raises(SystemExit, match='data folder /nowhere does not exist'):
        main(['--data-dir', '/nowhere', '--output', str(tmp_path / 'b')])
    with pytest.raises(SystemExit):
        main(['--help'])
    assert '--data-dir imagenet --output imagenet_ffcv' in capsys.readouterr().out
