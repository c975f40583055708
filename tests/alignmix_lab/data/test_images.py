import io
import struct

import numpy as np
import pytest
from PIL import Image

from alignmix_lab.data.images.decode import decode_image, image_size


@pytest.fixture
def photo(photos) -> Image.Image:
    return Image.fromarray(photos[0][:96, :128])


def saved(image: Image.Image, file_format: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    file.seek(0)
    return file


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_rgb_is_what_pillow_decodes(photo):
    np.testing.assert_array_equal(pixels(decode_image(saved(photo, 'PNG'))), pixels(photo))


@pytest.mark.parametrize('convert, file_format, tolerance', [
    (lambda image: image.convert('L'), 'PNG', 0),
    (lambda image: image.convert('CMYK'), 'TIFF', 3),
    (lambda image: image.convert('CMYK'), 'JPEG', 12),
    (lambda image: image.convert('RGBA'), 'PNG', 0),
    (lambda image: image.convert('RGBA'), 'WEBP', 12),
    (lambda image: image.convert('P', palette=Image.Palette.ADAPTIVE), 'PNG', 12),
    (lambda image: image.convert('LA'), 'PNG', 0),
])
def test_every_mode_becomes_rgb(photo, convert, file_format, tolerance):
    options = {'quality': 95} if file_format in ('JPEG', 'WEBP') else {}
    image = convert(photo)
    decoded = decode_image(saved(image, file_format, **options))
    grey = image.mode in ('L', 'LA')
    reference = photo.convert('L').convert('RGB') if grey else photo
    assert decoded.mode == 'RGB'
    assert np.abs(pixels(decoded) - pixels(reference)).mean() <= tolerance


def test_black_and_white(photo):
    image = photo.convert('1')
    decoded = decode_image(saved(image, 'PNG'))
    np.testing.assert_array_equal(pixels(decoded), np.asarray(image)[..., None].repeat(3, axis=2) * 255)


def test_sixteen_bit_grey_keeps_its_high_byte(photo):
    grey = np.asarray(photo.convert('L'))
    wide = Image.fromarray((grey.astype(np.uint16) << 8) + 17)
    decoded = decode_image(saved(wide, 'PNG'))
    np.testing.assert_array_equal(pixels(decoded), pixels(Image.fromarray(grey).convert('RGB')))


def test_palette_with_transparency(photo):
    image = photo.quantize(16)
    decoded = decode_image(saved(image, 'PNG', transparency=bytes(range(16))))
    np.testing.assert_array_equal(pixels(decoded), pixels(image.convert('RGB')))


@pytest.mark.parametrize('orientation, turned', [
    (3, lambda image: image.transpose(Image.Transpose.ROTATE_180)),
    (6, lambda image: image.transpose(Image.Transpose.ROTATE_90)),
    (8, lambda image: image.transpose(Image.Transpose.ROTATE_270)),
])
def test_exif_orientation_is_applied(photo, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(saved(turned(photo), 'PNG', exif=exif))
    np.testing.assert_array_equal(pixels(decoded), pixels(photo))


def test_damaged_exif_is_ignored(photo):
    decoded = decode_image(saved(photo, 'JPEG', exif=b'Exif\0\0garbage', quality=95))
    assert decoded.size == photo.size


def test_animation_gives_its_first_frame(photo):
    black = Image.new('RGB', photo.size)
    file = saved(photo, 'PNG', save_all=True, append_images=[black, black])
    np.testing.assert_array_equal(pixels(decode_image(file)), pixels(photo))


def test_a_huge_jpeg_is_decoded_small_and_a_huge_png_refused(photo):
    limit = photo.width * photo.height // 2
    decoded = decode_image(saved(photo, 'JPEG', quality=95), max_side=32, max_pixels=limit)
    reference = photo.resize(decoded.size, Image.Resampling.BOX)
    assert decoded.size == (64, 48)  # half; the next scale would be too small
    assert np.abs(pixels(decoded) - pixels(reference)).mean() < 3
    with pytest.raises(ValueError, match='128 x 96 pixels are more than the limit of 6144'):
        decode_image(saved(photo, 'PNG'), max_side=32, max_pixels=limit)


def test_truncated_files_fail(photo):
    for file_format in ('JPEG', 'PNG'):
        whole = saved(photo, file_format).getvalue()
        with pytest.raises((OSError, SyntaxError)):
            decode_image(io.BytesIO(whole[:len(whole) // 2]))


def test_pixels_without_an_eight_bit_meaning_are_refused():
    with pytest.raises(ValueError, match='floating-point'):
        decode_image(saved(Image.fromarray(np.ones((4, 4), np.float32)), 'TIFF'))
    with pytest.raises(ValueError, match='do not fit in 16 bits'):
        decode_image(saved(Image.fromarray(np.full((4, 4), 70000, np.int32)), 'TIFF'))


def twelve_bit_tiff(values: np.ndarray) -> io.BytesIO:
    """An uncompressed grey TIFF of 12 bits a pixel, which Pillow reads and does not write."""
    height, width = values.shape
    bits = ''.join(f'{value:012b}' for value in values.ravel())
    strip = int(bits, 2).to_bytes(len(bits) // 8, 'big')
    tags = [(256, 4, width), (257, 4, height), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 0), (277, 3, 1),
            (278, 4, height), (279, 4, len(strip))]
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = b''.join(
        struct.pack('<HHI', tag, kind, 1) + struct.pack('<I', offset if tag == 273 else value)
        for tag, kind, value in tags)
    return io.BytesIO(b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + bytes(4) + strip)


def test_twelve_bit_grey_keeps_its_brightness():
    values = np.linspace(0, 4095, 64).astype(int).reshape(8, 8)
    decoded = pixels(decode_image(twelve_bit_tiff(values)))
    np.testing.assert_array_equal(decoded, (values >> 4)[..., None].repeat(3, axis=2))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_size_from_the_header_is_that_of_the_upright_image(photo, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.save(tmp_path / 'a.jpg', exif=exif)
    assert image_size(tmp_path / 'a.jpg') == decode_image(tmp_path / 'a.jpg').size
