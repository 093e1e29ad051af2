from ._version import __version__ as __version__
from .accounting import Accountant as Accountant
from .accounting import Mechanism as Mechanism
from .accounting import UnattainableError as UnattainableError
from .accounting import adaptive_split as adaptive_split
from .accounting import calibrate as calibrate
from .config import PrivacyArguments as PrivacyArguments
