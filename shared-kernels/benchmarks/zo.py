"""Noise and zeroth-order updates against the same work in plain torch.

One step of MeZO applies the last step's update and perturbs the weights by plus and minus eps z,
with z drawn again from its seed wherever it is needed. In place that is four passes with a draw
each; ``zo_materialize`` reads the weights once and writes the updated weights and both
perturbations, drawing each z once.
"""

from __future__ import annotations

import torch
from shared_kernels.bench import Arm, Workload, benchmark

SEED, LAST_SEED = 0x9E3779B97F4A7C15, 0x2545F4914F6CDD1D
EPS, STEP = 1e-3, 1e-6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DISTS = ("gaussian", "rademacher")


@benchmark
def noise(device):
    for dist in DISTS:
        yield _noise(device, _elements(device), dist)


@benchmark
def zo_materialize(device):
    for dtype in DTYPES:
        for dist in DISTS:
            yield _materialize(device, _elements(device), dtype, dist)


@benchmark
def zo_replay(device):
    for dist in DISTS:
        yield _replay(device, _elements(device) // 4, dist, records=32)


def _elements(device):
    if device == "cpu":
        return 1 << 22
    free, _ = torch.cuda.mem_get_info()
    elements = 1 << 30
    # The largest workload holds 40 bytes per element.
    while 48 * elements > free:
        elements //= 2
    return elements


def _draw(like, dist, generator):
    if dist == "gaussian":
        return torch.empty_like(like).normal_(generator=generator)
    # The fastest signs that plain torch draws: in bytes, converted once.
    signs = torch.empty_like(like, dtype=torch.int8).random_(0, 2, generator=generator)
    return signs.mul_(2).sub_(1).to(like.dtype)


def _assert_equal(found, expected):
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0)


def _copy_arm(device, count):
    """A copy that reads and writes ``count`` bytes in all: what the memory can do at best."""
    source = torch.randn(count // 8, device=device)
    target = torch.empty_like(source)
    return Arm(name="copy of as many bytes", fn=lambda: target.copy_(source), bytes=count)


def _noise(device, elements, dist):
    from shared_kernels.random import noise

    def ours(numel=elements, start=0, device=device, impl="auto"):
        return noise(numel, seed=SEED, uid=7, dist=dist, start=start, device=device, impl=impl)

    def check():
        drawn = ours()
        for start in (0, elements // 2 + 11, elements - 5000):
            expected = ours(5000, start, "cpu", "reference")
            _assert_equal(drawn[start : start + 5000], expected)

    generator = torch.Generator(device).manual_seed(1)
    like = torch.empty(1, device=device).expand(elements)
    plain = lambda: _draw(like, dist, generator)  # noqa: E731
    count = 4 * elements
    return Workload(
        name=f"noise/{dist}",
        params={"elements": elements, "dtype": "fp32"},
        device=device,
        check=check,
        baseline="torch",
        arms=[
            Arm(name="torch", fn=plain, bytes=count),
            Arm(name="shared_kernels", fn=ours, bytes=count),
            _copy_arm(device, count),
        ],
    )


class _Weights:
    """A flat buffer of equal parameters, the last one shorter, and what the ops need of it."""

    def __init__(self, device, elements, dtype, dist, records):
        from shared_kernels.ops.zo import Segment, build_tile_table

        self.device, self.dist, self.records = device, dist, records
        size = min(1 << 24, elements // 8)
        sizes = [size] * (elements // size)
        sizes[-1] -= 777
        segments = [Segment(uid, numel, True) for uid, numel in enumerate(sizes, 1)]
        self.tiles = build_tile_table(segments, device)
        self.master = torch.randn(elements, device=device).mul_(0.02).to(dtype)
        self.spans = [(i * size, i * size + numel) for i, numel in enumerate(sizes)]
        seeds = [LAST_SEED + record for record in range(records)]
        words = [[_int32(seed), _int32(seed >> 32), 0] for seed in seeds]
        self.keys = torch.tensor(words, dtype=torch.int32, device=device)
        self.coefs = torch.tensor([[1.0, STEP]] * records, device=device)
        self.stochastic = dtype is torch.bfloat16

    def views(self, *buffers):
        """The parameters, as views of the given flat buffers."""
        return [tuple(flat[begin:end] for flat in buffers) for begin, end in self.spans]

    def materialize(self, master, plus=None, minus=None, tiles=None, impl="auto"):
        from shared_kernels.ops.zo import Perturbation, zo_materialize

        device = master.device
        zo_materialize(
            master,
            (self.tiles if tiles is None else tiles).to(device),
            self.keys.to(device),
            self.coefs.to(device),
            perturb=None if plus is None else Perturbation(SEED, 0, EPS),
            plus=plus,
            minus=minus,
            fold=True,
            rounding="stochastic" if self.stochastic else "nearest",
            dither_seed=SEED,
            dist=self.dist,
            impl=impl,
        )

    def check(self, plus=None, minus=None):
        """Compare a tile in the middle and the last one, which has padding, with the reference."""
        from shared_kernels.ops.zo import TILE

        count = len(self.tiles)
        windows = [slice(i * TILE, (i + 1) * TILE) for i in (count // 3, count - 1)]
        before = [self.master[window].to("cpu", copy=True) for window in windows]
        self.materialize(self.master, plus, minus)
        for window, expected in zip(windows, before, strict=True):
            outputs = [out if out is None else torch.empty_like(expected) for out in (plus, minus)]
            tiles = self.tiles[window.start // TILE : window.stop // TILE].cpu()
            self.materialize(expected, *outputs, tiles=tiles, impl="reference")
            _assert_equal(self.master[window], expected)
            for out, expected_out in zip((plus, minus), outputs, strict=True):
                if out is not None:
                    _assert_equal(out[window], expected_out)


def _int32(word):
    word &= 0xFFFFFFFF
    return word - (word >> 31 << 32)


def _materialize(device, elements, dtype, dist):
    weights = _Weights(device, elements, DTYPES[dtype], dist, records=1)
    plus, minus = torch.empty_like(weights.master), torch.empty_like(weights.master)
    theta = weights.master.clone()
    generator = torch.Generator(device)

    def add_noise(seed, scale):
        generator.manual_seed(seed)
        for (parameter,) in weights.views(theta):
            parameter.add_(_draw(parameter, dist, generator), alpha=scale)

    def in_place():
        add_noise(1, -STEP)
        for scale in (EPS, -2 * EPS, EPS):
            add_noise(2, scale)

    def out_of_place():
        add_noise(1, -STEP)
        generator.manual_seed(2)
        for parameter, above, below in weights.views(theta, plus, minus):
            z = _draw(parameter, dist, generator)
            torch.add(parameter, z, alpha=EPS, out=above)
            torch.sub(parameter, z, alpha=EPS, out=below)

    # Read the weights; write them and both perturbations.
    count = 4 * weights.master.nbytes
    arms = [
        Arm(name="torch, in place (MeZO)", fn=in_place, bytes=count),
        Arm(name="torch, out of place", fn=out_of_place, bytes=count),
        Arm(
            name="zo_materialize",
            fn=lambda: weights.materialize(weights.master, plus, minus),
            bytes=count,
        ),
        _copy_arm(device, count),
    ]
    if device == "cuda" and dist == "gaussian":
        arms.insert(2, Arm(name="torch.compile", fn=_compiled(weights, theta, plus, minus)))
    return Workload(
        name=f"zo_materialize/{dist}/{dtype}",
        params={"elements": elements, "dtype": dtype, "parameters": len(weights.spans)},
        device=device,
        check=lambda: weights.check(plus, minus),
        baseline="torch, in place (MeZO)",
        arms=arms,
    )


def _compiled(weights, theta, plus, minus):
    """The out-of-place step with inductor's own noise fused into each pass."""

    @torch.compile
    def update(parameter):
        parameter.sub_(torch.randn_like(parameter), alpha=STEP)

    @torch.compile
    def perturb(parameter, above, below):
        z = torch.randn_like(parameter)
        above.copy_(parameter + EPS * z)
        below.copy_(parameter - EPS * z)

    def step():
        torch.manual_seed(1)
        for (parameter,) in weights.views(theta):
            update(parameter)
        torch.manual_seed(2)
        for views in weights.views(theta, plus, minus):
            perturb(*views)

    return step


def _replay(device, elements, dist, records):
    weights = _Weights(device, elements, torch.float32, dist, records)
    theta = weights.master.clone()
    generator = torch.Generator(device)

    def one_by_one():
        for record in range(records):
            generator.manual_seed(record)
            for (parameter,) in weights.views(theta):
                parameter.sub_(_draw(parameter, dist, generator), alpha=STEP)

    count = 2 * weights.master.nbytes
    return Workload(
        name=f"zo_replay/{dist}",
        params={"elements": elements, "dtype": "fp32", "records": records},
        device=device,
        check=weights.check,
        baseline="torch, one by one",
        arms=[
            Arm(name="torch, one by one", fn=one_by_one, bytes=count),
            Arm(name="zo_replay", fn=lambda: weights.materialize(weights.master), bytes=count),
        ],
    )
