"""A folder with every kind of harm: converted, verified, damaged and trained on."""
import csv
import json
import math
import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip('ffcv', reason='FFCV is not installed')

from alignmix_lab.data import convert  # noqa: E402
from alignmix_lab.data.ffcv.beton import inspect_beton  # noqa: E402
from alignmix_lab.data.ffcv.verify import verify_beton  # noqa: E402
from tests.alignmix_lab.data import hostile  # noqa: E402


@pytest.fixture(scope='module')
def converted():
    """What was made, what was reported, and the folder of the result."""
    with tempfile.TemporaryDirectory(prefix='hostile ') as folder:
        try:
            with hostile.permissions_hold():
                made = hostile.build(Path(folder) / 'images', 200)
                report, _ = convert(str(Path(folder) / 'images'), Path(folder) / 'out', workers=0, progress=False)
        except OSError as error:
            if 'capabilities' not in str(error):
                raise
            pytest.skip(f'permissions cannot be denied to root here: {error}')
        yield made, report, Path(folder) / 'out'


def test_every_harm_is_reported_and_the_rest_kept(converted):
    made, report, _ = converted
    assert set(made) > set(hostile.HARMS) | set(hostile.LARGE_HARMS)
    fates = {str(place): fate for entries in made.values() for place, fate in entries}
    assert {image.name for image in report.unreadable} == {
        place for place, fate in fates.items() if fate == hostile.UNREADABLE}
    assert {entry.name for entry in report.skipped} == {
        place for place, fate in fates.items() if fate == hostile.SKIPPED}
    assert all(image.reason for image in report.unreadable) and all(entry.reason for entry in report.skipped)
    info = inspect_beton(report.path)
    kept = Counter(Path(place).parent.name for place, fate in fates.items() if fate == hostile.KEPT)
    assert Counter(info.class_names[label] for label in info.labels) == kept
    assert sorted(map(os.fsencode, info.class_names)) == sorted(hostile.CLASSES)


def test_reports_beside_the_file_name_all_that_was_left_out(converted):
    _, report, _ = converted
    with open(f'{report.path}.unreadable.csv', newline='', encoding='utf-8', errors='surrogateescape') as file:
        listed = list(csv.DictReader(file))
    left_out = [*report.unreadable, *report.skipped]
    assert [row['name'] for row in listed] == [entry.name for entry in left_out]
    assert [row['reason'] for row in listed] == [entry.reason for entry in left_out]
    description = json.loads(Path(f'{report.path}.json').read_text())
    assert (description['num_samples'], description['num_unreadable'], description['num_skipped']) == (
        report.num_samples, len(report.unreadable), len(report.skipped))


def test_verify_finds_every_changed_byte(converted):
    _, report, _ = converted
    assert verify_beton(report.path, progress=False) == []
    assert hostile.damage_found(report.path, 30) == 30


def test_files_cut_short_or_of_another_version_are_refused(converted, tmp_path):
    _, report, _ = converted
    whole, path = report.path.read_bytes(), tmp_path / 'train.beton'
    for size in (0, 30, len(whole) // 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match='cut short'):
            inspect_beton(path)
    path.write_bytes(b'\x01\x00' + whole[2:])
    with pytest.raises(ValueError, match=r'not a .beton file of format 2 \(it says 1\)'):
        inspect_beton(path)


def test_training_on_the_rest_runs(converted):
    _, _, folder = converted
    losses = hostile.train_two_steps(folder)
    assert len(losses) == 2 and all(map(math.isfinite, losses))
