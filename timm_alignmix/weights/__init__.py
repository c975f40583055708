"""Trained weights that load like timm's own: export, local tags, upload to the Hugging Face hub."""
from .export import export
from .folder import key_problems, read_config, verify
from .hub import push
from .registry import install, list_local, register_local, registry_dir

__all__ = [
    'export', 'install', 'key_problems', 'list_local', 'push', 'read_config', 'register_local', 'registry_dir',
    'verify']
