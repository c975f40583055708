"""Packaging of timm-alignmix: `pip install .` is the plugin, the extras add what its programs and tests need."""
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = {}
exec((here / 'timm_alignmix' / 'version.py').read_text(encoding='utf-8'), version)

train = [
    'accelerate>=1.0',
    'matplotlib>=3.8',
    'psutil>=5.9',
    'pyyaml>=6.0',
    'scikit-learn>=1.3',  # carries the built-in sample
    'scipy>=1.11',
    'torchvision>=0.20',
    'tqdm>=4.65',
]
evaluate = [
    *train,
    'jinja2>=3.1',
    'opencv-python-headless>=4.8.1',
    'torchmetrics>=1.4',
    'umap-learn>=0.5.6',
]
detection = [
    *train,
    'faster-coco-eval>=1.6',
    'pillow>=10.1',
]
ffcv = [
    'ffcv==1.0.2',  # no release since 2023: what we rely on was read in this one
    'setuptools; python_version >= "3.12"',  # ffcv imports distutils, which Python dropped
]
test = [
    'foolbox==3.3.4',  # the attacks are compared with this release
    'hypothesis>=6.100',
    'POT>=0.9.4',
    'pycocotools>=2.0.8',
    'pytest>=8.0',
    'pytest-xdist>=3.6',
    'tensorboard>=2.15',
    'webdataset>=1.0',
]
docs = [
    'mkdocs>=1.6,<2',  # 2 has no plugins
    'mkdocs-material>=9.7',
    'mkdocstrings-python>=2.0',
    'ruff==0.17.5',  # breaks the lines of long signatures
]
dev = [
    'build',
    'mypy==2.4.1',
    'pre-commit',
    'ruff==0.17.5',  # the version pinned in .pre-commit-config.yaml
    'twine',
]

setup(
    name='timm-alignmix',
    version=version['__version__'],
    description='AlignMixup, MultiMix and Dense MultiMix for timm, with ImageNet-scale training',
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='The timm-alignmix authors',
    license='Apache-2.0',
    license_files=['LICENSE'],
    project_urls={
        'AlignMixup': 'https://arxiv.org/abs/2103.15375',
        'MultiMix': 'https://arxiv.org/abs/2311.05538',
        'timm': 'https://github.com/huggingface/pytorch-image-models',
    },
    packages=[
        *find_packages(include=['timm_alignmix', 'timm_alignmix.*', 'alignmix_lab', 'alignmix_lab.*']),
        'alignmix_lab.recipes',
    ],
    package_dir={'alignmix_lab.recipes': 'recipes'},  # where the programs find recipes by name without a clone
    package_data={
        'timm_alignmix': ['py.typed'],
        'alignmix_lab.recipes': ['**/*.yaml', 'README.md'],
        'alignmix_lab.evaluation': ['published.csv', 'report.html', 'studies.yaml'],
    },
    entry_points={'console_scripts': ['alignmix = alignmix_lab.__main__:main']},
    python_requires='>=3.10',
    install_requires=[
        'numpy>=1.26',
        'timm>=1.0.31',
        'torch>=2.5',
    ],
    extras_require={
        'train': train,
        'detection': detection,
        'evaluate': evaluate,
        'ffcv': ffcv,
        'test': detection + evaluate + docs + test,
        'docs': docs,
        'dev': dev,
    },
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3 :: Only',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 14)),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Typing :: Typed',
    ],
)
