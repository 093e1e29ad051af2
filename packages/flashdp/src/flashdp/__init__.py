"""Differentially private training of large models.

Per-sample clipping layer by layer inside backward (FlashDP), noise from a cryptographic generator,
Poisson sampling, and an account of the steps really taken. Importing this package loads neither
torch nor transformers; names load when first used. They are listed in ``__init__.pyi``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
