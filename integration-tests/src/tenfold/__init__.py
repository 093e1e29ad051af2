"""Tenfold: the tour through the packages on real inputs, and the tests of several together."""
