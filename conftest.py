"""Which modules pytest can import: an import that fails in any other is an error, not a skip."""
from importlib.util import find_spec

collect_ignore = []
if find_spec('ffcv') is None:  # these compile its pipeline when they are imported
    collect_ignore += ['alignmix_lab/data/ffcv/decoder.py', 'alignmix_lab/data/ffcv/loader.py']
