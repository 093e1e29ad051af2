from . import tasks as tasks
from ._version import __version__ as __version__
from .circuit import Circuit as Circuit
from .errors import UnsupportedModelError as UnsupportedModelError
from .finder import CircuitFinder as CircuitFinder
from .graph import Graph as Graph
from .metrics import METRICS as METRICS
from .tasks import Task as Task
