"""Schedules of samples on slots: bounds, orders, plans with a certificate, and a simulator."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
