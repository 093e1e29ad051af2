"""Zeroth-order fine-tuning of models that do not fit the GPU.

Forward passes only (MeZO), blocks streamed from host memory (ZO2), the whole run kept as a log of
32 bytes a step that replays to the same weights bit for bit. Importing this package loads neither
torch nor transformers; names load when first used. They are listed in ``__init__.pyi``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
