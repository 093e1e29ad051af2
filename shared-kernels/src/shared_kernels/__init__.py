"""Kernels, offload engine and benchmark tools that the Tenfold packages share.

Importing this package loads none of its submodules: ``shared_kernels.random``, ``.ops``,
``.offload``, ``.models``, ``.checkpoint``, ``.bench`` and ``.testing`` (and with them torch) load
at first use. The public names are listed in ``__init__.pyi``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
