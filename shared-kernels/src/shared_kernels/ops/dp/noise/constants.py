"""Numbers that define the noise step."""

from typing import Final

#: Steps of the grid per standard deviation.
GRID: Final = 2.0**20
#: Smallest and largest standard deviation and divisor: the scale factors stay normal float64.
SMALLEST: Final = 2.0**-126
LARGEST: Final = 2.0**126
