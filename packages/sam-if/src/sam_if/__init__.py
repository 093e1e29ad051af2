"""Which training samples made a model trained with sharpness-aware minimization what it is.

Importing this package loads neither torch nor transformers; names load when first used. They are
listed in ``__init__.pyi``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
