"""What a benchmark compares: the arms of a workload."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of doing the work of a workload.

    The counts are the fewest that the arm's *task* needs, not what its implementation happens to
    do: each input byte read once, each output byte written once. An arm that counts nothing gets
    no limit.

    Attributes:
        name: Unique within the workload.
        fn: The timed callable. On a GPU it must leave its work on the current stream, or be
            measured by a workload with ``clock="wall"`` or ``"returned"``.
        setup: Called before every call of ``fn``, outside the timed region.
        teardown: Called after every call of ``fn``, outside the timed region.
        bytes: Bytes read plus written in the memory of the workload's device.
        flops: Floating-point operations, a multiply-add counting two.
        flops_dtype: Operand type of those operations: fp64, fp32, tf32, bf16 or fp16.
        h2d_bytes: Bytes copied from host to device.
        d2h_bytes: Bytes copied from device to host.
    """

    name: str
    fn: Callable[[], object]
    setup: Callable[[], object] | None = None
    teardown: Callable[[], object] | None = None
    bytes: int = 0
    flops: int = 0
    flops_dtype: str = "fp32"
    h2d_bytes: int = 0
    d2h_bytes: int = 0

    def __post_init__(self) -> None:
        for count in ("bytes", "flops", "h2d_bytes", "d2h_bytes"):
            if getattr(self, count) < 0:
                raise ValueError(
                    f"expected {count} >= 0 in arm {self.name!r}; got {getattr(self, count)}"
                )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Arms that do the same work on the same inputs, and the proof that they do it right.

    Attributes:
        name: Unique within the benchmark file, for example ``"noise/gaussian"``.
        params: Sizes, dtypes and options, as JSON values; they go into the result file.
        arms: At least two, in the order of the report.
        baseline: Name of the arm that the others are compared with.
        check: Correctness gate, called before anything is timed. It raises or returns ``False``
            when an arm's result is wrong, and then no time of this workload is reported.
        device: Torch device of the inputs, for example ``"cuda"``.
        clock: ``"events"`` (CUDA events on the current stream), ``"wall"`` (host clock between
            two synchronisations), ``"returned"`` (the seconds that each ``fn`` returns, for
            example of one step among many) or ``"auto"``: events on a GPU, the host clock
            elsewhere.
        flush_l2: Overwrite the GPU's L2 cache before every call timed by events.
    """

    name: str
    arms: Sequence[Arm]
    baseline: str
    check: Callable[[], bool | None]
    device: str = "cpu"
    params: Mapping[str, object] = field(default_factory=dict)
    clock: Literal["auto", "events", "wall", "returned"] = "auto"
    flush_l2: bool = True

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(names) < 2 or len(set(names)) != len(names):
            raise ValueError(
                f"expected at least two arms with different names in workload {self.name!r}; "
                f"got {names}"
            )
        if self.baseline not in names:
            raise ValueError(
                f"expected the baseline of workload {self.name!r} to be one of its arms {names}; "
                f"got {self.baseline!r}"
            )
        if self.clock not in ("auto", "events", "wall", "returned"):
            raise ValueError(
                f"expected clock 'auto', 'events', 'wall' or 'returned'; got {self.clock!r}"
            )
        if self.clock == "events" and not self.device.startswith("cuda"):
            raise ValueError(
                f"expected a CUDA device for clock 'events' in workload {self.name!r}; "
                f"got {self.device!r}: use 'auto' or 'wall'"
            )
