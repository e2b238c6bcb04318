"""The model families of `scar convert`, and how a file is told to be one.

In: a family's name, or the names of a file's tensors. Out: a `Family` and its
converter module. Importing this imports no model. Called by
`commands/convert.py`.

To add a family, write `scar_jax/convert/<module>.py` with the members of
`Converter` and one row in `FAMILIES`.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from scar_jax.config_values import nearest
from scar_jax.types import PyTree


class Converter(Protocol):
  """What the module of a family holds.

  Optional, read by name:

  * `artifact(cfg, params) -> (kind, cfg, params)`: what is written, as the
    commands and tasks load it; without it the family's kind and both as they
    are.
  * `size(cfg) -> str`: name of the published size, or 'custom'.
  * `reverse(cfg, params) -> tensors`, of an artifact's config and parameters;
    without it `table(cfg) -> entries` with which `common.disassemble` does it.
  * `buffers(cfg) -> tensors` that hold no weight but that the reference's
    strict loading asks for; `reverse` adds them.
  """

  def detect(self, state: Mapping[str, Any], **hints: Any) -> Any:
    """The config, from the shapes of tensors; `state` holds no values.

    Keywords are what a command line may add (`--heads`, `--image_size`, ...);
    all have defaults.
    """
    ...

  def convert(
    self, cfg: Any, state: Mapping[str, np.ndarray]
  ) -> dict[str, Any]:
    """The parameters, through `common.assemble`.

    `state` reads a tensor at each access: rename with `readers.Renamed`, which
    reads nothing, not into a dict.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Family:
  """One row of the registry.

  Attributes:
    name: on the command line.
    module: in `scar_jax.convert`.
    about: for the help text.
    kind: of the artifact, where the module has no `artifact`.
    marks: regular expressions; each is found at the start of some tensor name.
    lacks: regular expressions that no tensor name starts with.
    fixed: keywords for `detect` that tell families of one module apart.
    reversible: `--reverse` works.
  """

  name: str
  module: str
  about: str
  kind: str
  marks: tuple[str, ...]
  lacks: tuple[str, ...] = ()
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  reversible: bool = False

  def fits(self, names: Iterable[str]) -> bool:
    """Whether tensors of these names are of this family."""
    names = list(names)

    def found(pattern: str) -> bool:
      return any(re.match(pattern, name) for name in names)

    return all(map(found, self.marks)) and not any(map(found, self.lacks))

  @property
  def available(self) -> bool:
    """Its module is part of this version."""
    name = f'scar_jax.convert.{self.module}'
    return importlib.util.find_spec(name) is not None

  def load(self) -> Any:
    """Its converter module.

    Raises:
      ValueError: this version has none.
    """
    if not self.available:
      raise ValueError(
        f'the family {self.name!r} is not part of this version; accepted: '
        f'{", ".join(f.name for f in FAMILIES if f.available)}'
      )
    return importlib.import_module(f'scar_jax.convert.{self.module}')


_GPT = r'tok_embeddings\.weight'
_DINOV2 = (
  r'(dinov2\.)?(blocks\.(\d+\.)+ls1\.gamma'
  r'|encoder\.layer\.\d+\.layer_scale1\.lambda1)'
)
_VIT = (
  r'(vit\.)?(blocks\.\d+\.attn\.qkv\.weight'
  r'|encoder\.layer\.\d+\.layernorm_before\.weight)'
)
_SAM = r'(image_encoder\.|vision_encoder\.)?(blocks|layers)\.\d+\.attn\.rel_pos'
# The first that fits wins: the SCAR release holds a DINOv2 as well. A row whose
# module is not there yet is still recognised, and says so when it is asked for.
FAMILIES: tuple[Family, ...] = (
  Family(
    'llamagen-vq', 'llamagen_vq', 'LlamaGen VQ-8 and VQ-16', 'tokenizer',
    (r'quantize\.embedding\.weight', r'encoder\.conv_blocks\.'),
    reversible=True,
  ),
  Family(
    'var-vqvae', 'var_vqvae', "VAR's multi-scale VQVAE", 'tokenizer',
    (r'quantize\.embedding\.weight', r'quantize\.quant_resi\.'),
    reversible=True,
  ),
  Family(
    'var', 'var', 'VAR d16 to d36', 'scar',
    (r'word_embed\.weight', r'pos_1LC'),
    reversible=True,
  ),
  Family(
    'scar', 'scar_official', 'the official SCAR edit model', 'scar',
    (_GPT, r'dino_mlp\.'),
    reversible=True,
  ),
  Family(
    'editar', 'editar', 'EditAR', 'scar',
    (_GPT, r'img_uncond_embedding'), (r'dino_mlp\.',),
    fixed={'kind': 'editar'}, reversible=True,
  ),
  Family(
    'llamagen-gpt', 'editar', 'LlamaGen GPT, of classes or captions', 'scar',
    (_GPT,), (r'img_uncond_embedding', r'dino_mlp\.'),
    fixed={'kind': 'llamagen'}, reversible=True,
  ),
  Family(
    'dinov2', 'dinov2', "DINOv2 in Meta's or Hugging Face's names", 'encoder',
    (_DINOV2,),
  ),
  Family(
    'sam', 'sam', 'image encoder of SAM', 'encoder', (_SAM,),
  ),
  Family(
    'clip', 'clip', 'CLIP, images and text (Hugging Face)', 'encoder',
    (r'(vision_model|text_model)\.encoder\.layers\.',),
  ),
  Family(
    'vit', 'vit', 'ViT in the names of Hugging Face or timm', 'encoder',
    (_VIT,), (_DINOV2, _SAM),
  ),
  Family(
    'depth-anything', 'depth_anything', 'Depth Anything V1 and V2', 'depth',
    (r'(backbone|pretrained)\.', r'(neck\.reassemble_stage|depth_head)\.'),
  ),
  Family(
    't5', 't5', 'encoder of T5 and flan-T5 (Hugging Face)', 'text',
    (r'encoder\.block\.\d+\.layer\.0\.SelfAttention\.',),
  ),
)  # fmt: skip


def find_family(name: str) -> Family:
  """The family of a name.

  Raises:
    ValueError: unknown; lists all.
  """
  for family in FAMILIES:
    if family.name == name:
      return family
  known = [f.name for f in FAMILIES]
  raise ValueError(
    f'FAMILY={name!r}.{nearest(name, known)} accepted: {", ".join(known)}'
  )


def detect_family(names: Iterable[str], asked: str | None = None) -> Family:
  """The family of tensors.

  Args:
    names: of the tensors.
    asked: what the user says it is; checked.

  Raises:
    ValueError: no family, or another than asked for.
  """
  names = list(names)
  fitting = [family for family in FAMILIES if family.fits(names)]
  some = f'{len(names)} tensors such as {sorted(names)[:5]}'
  if asked:
    family = find_family(asked)
    if fitting and family not in fitting:
      raise ValueError(
        f'FAMILY={asked!r}, but the file looks like {fitting[0].name!r} '
        f'({fitting[0].about}; {some}); accepted: {fitting[0].name}, or leave '
        'FAMILY out'
      )
    return family
  if not fitting:
    raise ValueError(
      f'no family has these tensors: {some}; accepted: '
      f'{", ".join(f.name for f in FAMILIES)} (name one to see what does not '
      'fit)'
    )
  return fitting[0]


def detect_config(
  family: Family, shapes: Mapping[str, Any], hints: Mapping[str, Any]
) -> Any:
  """The config of a checkpoint.

  Args:
    family: of the checkpoint.
    shapes: of its tensors.
    hints: what the user adds; None is not given.

  Raises:
    ValueError: a hint that this family does not take; see the module's own.
  """
  detect = family.load().detect
  accepted = set(inspect.signature(detect).parameters) - {'state', 'kind'}
  given = {k: v for k, v in hints.items() if v is not None}
  other = sorted(set(given) - accepted)
  if other:
    flags = (
      ', '.join(f'--{name}' for name in sorted(accepted)) or 'no such flag'
    )
    raise ValueError(
      f'--{other[0]}={given[other[0]]!r} means nothing for FAMILY='
      f'{family.name!r}; accepted: {flags}'
    )
  return detect(shapes, **family.fixed, **given)


def size_name(family: Family, cfg: Any) -> str:
  """Name of a config's published size; 'custom' if it has none."""
  size = getattr(family.load(), 'size', None)
  return size(cfg) if size else 'custom'


def as_artifact(
  family: Family, cfg: Any, params: PyTree
) -> tuple[str, Any, PyTree]:
  """`(kind, config, parameters)` of what is written."""
  make = getattr(family.load(), 'artifact', None)
  return make(cfg, params) if make else (family.kind, cfg, params)


def reverse_tensors(
  family: Family, cfg: Any, params: PyTree
) -> dict[str, np.ndarray]:
  """The tensors of an artifact under the reference's names.

  Raises:
    ValueError: a family, or a model, that has no way back.
  """
  if not family.reversible:
    names = [f.name for f in FAMILIES if f.reversible]
    raise ValueError(
      f'--reverse of FAMILY={family.name!r}; accepted: {", ".join(names)}'
    )
  module = family.load()
  if hasattr(module, 'reverse'):
    tensors = module.reverse(cfg, params)
  else:
    from scar_jax.convert.common import disassemble

    tensors = disassemble(module.table(cfg), params)
  if hasattr(module, 'buffers'):
    tensors |= module.buffers(cfg)
  # A file holds what lies in memory, which transposes do not.
  return {k: np.ascontiguousarray(v) for k, v in tensors.items()}
