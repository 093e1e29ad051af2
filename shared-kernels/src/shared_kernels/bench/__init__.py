"""Benchmarks: arms timed side by side, judged against the limits of the machine they ran on."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
