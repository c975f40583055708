"""Reading images: FFCV's .beton files, timm's datasets, and the built-in sample. FFCV is imported when it is used."""
from .loaders import Loaders, create_loaders
from .sample import SAMPLE_DEFAULTS, sample_dir
from .sources import open_source
from .writer import WriteReport, WriteSettings, convert, write_beton

__all__ = [
    'SAMPLE_DEFAULTS',
    'Loaders',
    'WriteReport',
    'WriteSettings',
    'convert',
    'create_loaders',
    'open_source',
    'sample_dir',
    'write_beton',
]
