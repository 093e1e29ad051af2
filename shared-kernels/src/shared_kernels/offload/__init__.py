"""Stream the repeated blocks of any ``nn.Module`` between host memory and a small device ring."""

from shared_kernels.offload.bandwidth import Bandwidth, measure_bandwidth
from shared_kernels.offload.blocks import BlockPlan, ParamRef, Unit, discover_blocks
from shared_kernels.offload.codecs import CODECS, Codec
from shared_kernels.offload.engine import DecodeMaterializer, OffloadEngine
from shared_kernels.offload.layout import Run, RunBuffers, UnitLayout, layout_unit
from shared_kernels.offload.memory import (
    HostBuffer,
    HostMemoryError,
    MemoryLimits,
    memory_limits,
    require_host_memory,
)
from shared_kernels.offload.store import DeviceRing, UnitBuffer, WeightStore
from shared_kernels.offload.transfer import make_transfer

__all__ = [
    "CODECS",
    "Bandwidth",
    "BlockPlan",
    "Codec",
    "DecodeMaterializer",
    "DeviceRing",
    "HostBuffer",
    "HostMemoryError",
    "MemoryLimits",
    "OffloadEngine",
    "ParamRef",
    "Run",
    "RunBuffers",
    "Unit",
    "UnitBuffer",
    "UnitLayout",
    "WeightStore",
    "discover_blocks",
    "layout_unit",
    "make_transfer",
    "measure_bandwidth",
    "memory_limits",
    "require_host_memory",
]
