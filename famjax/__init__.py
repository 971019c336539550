"""famjax: TransformerFAM (Hwang et al. 2024, arXiv 2404.09173) in JAX and Flax.

Public names are imported when they are first used, so that `import famjax` costs what it needs.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Decoder": "famjax.model.decoder",
    "MemoryConfig": "famjax.model.config",
    "ModelConfig": "famjax.model.config",
    "State": "famjax.model.state",
    "Model": "famjax.inference.model",
    "Reading": "famjax.inference.engine",
    "Request": "famjax.inference.generation",
    "Sampling": "famjax.inference.sampling",
    "UserError": "famjax.errors",
    "load": "famjax.inference.model",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
  if name not in _PUBLIC:
    raise AttributeError(f"module 'famjax' has no attribute {name!r}")
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
  return sorted(__all__)
