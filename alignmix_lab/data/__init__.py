"""Reading images: FFCV's .beton files, timm's datasets, and the built-in sample. FFCV is imported when it is used."""
from .ffcv.writer import WriteReport, WriteSettings, convert, write_beton
from .images.sources import open_source
from .loaders import Loaders, create_loaders
from .sample import sample_dir

__all__ = [
    'Loaders',
    'WriteReport',
    'WriteSettings',
    'convert',
    'create_loaders',
    'open_source',
    'sample_dir',
    'write_beton',
]
