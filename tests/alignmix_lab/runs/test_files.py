"""Files that are written whole, and the lock of a run's folder."""
import os

from alignmix_lab.runs.files import write_whole


def test_a_path_that_the_locale_cannot_decode_is_written_back(tmp_path):
    """As a path such as /data/größe arrives under LC_ALL=C without UTF-8 mode."""
    name = b'gr\xc3\xb6\xc3\x9fe'
    write_whole(tmp_path / 'report.md', name.decode('ascii', 'surrogateescape'))
    assert (tmp_path / 'report.md').read_bytes() == name and os.listdir(tmp_path) == ['report.md']
