"""Version of the installed distribution, or of the checkout this file lies in."""

from shared_kernels.versions import package_version

__version__ = package_version("sam-if", __file__)
