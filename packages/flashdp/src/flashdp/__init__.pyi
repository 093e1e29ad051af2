from ._version import __version__ as __version__
from .config import PrivacyArguments as PrivacyArguments
