from . import bench as bench
from . import checkpoint as checkpoint
from . import offload as offload
from . import ops as ops
from . import random as random
from . import testing as testing
from .versions import __version__ as __version__
