"""Score many continuations of one prefix on a live transformers model.

The prefix's keys and values are held once and read where they are; tokens that continuations share
are computed once; results are those of one forward pass per continuation. For people who measure
models they own. Importing this package loads neither torch nor transformers; names load when first
used. They are listed in ``__init__.pyi``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
