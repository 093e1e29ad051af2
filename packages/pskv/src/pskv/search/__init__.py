"""Search for the tokens after which a model says a given sentence.

For people who measure models they own: how many evaluations it takes until a benign sentence that
the model would not say unprompted comes out, before and after a defence. Names load when first
used; they are listed in ``__init__.pyi``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
