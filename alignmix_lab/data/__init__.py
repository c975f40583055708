"""Image loading from FFCV's .beton files, timm's datasets and a built-in sample. FFCV is only imported when used."""
from .ffcv.writer import WriteSettings, convert, write_beton
from .images.sources import open_source
from .loaders import create_loaders
from .sample import sample_dir

__all__ = ['WriteSettings', 'convert', 'create_loaders', 'open_source', 'sample_dir', 'write_beton']
