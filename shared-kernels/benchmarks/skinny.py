"""Few rows times several matrices, beside the matrix library one by one and on their joint matrix.

The projections of 28 layers of Qwen3-1.7B's shape in a row, replayed from a CUDA graph as a
decoding step is: all of them together do not fit into the caches.
"""

from __future__ import annotations

import torch
from shared_kernels.bench import Arm, Workload, benchmark

INNER, LAYERS = 2048, 28
SHAPES = {"qkv": (2048, 1024, 1024), "gate-up": (6144, 6144)}


def recorded(run):
    """Record all layers once; return what replays them."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    return lambda: (graph.replay(), kept)


@benchmark
def hopper(device):
    if device == "cpu":
        return
    from shared_kernels.ops.skinny import skinny_linears

    linear = torch.nn.functional.linear
    for name, sizes in SHAPES.items():
        for rows in (32, 64):
            draw = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)  # noqa: E731
            x = draw(rows, INNER)
            joint = [draw(sum(sizes), INNER) for _ in range(LAYERS)]
            layers = [[part.contiguous() for part in w.split(sizes)] for w in joint]
            arms = {
                "one by one": lambda x=x, layers=layers: [
                    linear(x, w) for ws in layers for w in ws
                ],
                "joint matrix": lambda x=x, joint=joint: [linear(x, w) for w in joint],
                "skinny_linears": lambda x=x, layers=layers: [
                    skinny_linears(x, ws) for ws in layers
                ],
            }

            def check(x=x, layers=layers):
                for ws in layers[:2]:
                    for found, w in zip(skinny_linears(x, ws), ws, strict=True):
                        exact = x.double() @ w.double().T
                        assert float((found - exact).norm() / exact.norm()) < 4e-3

            count = sum(sizes) * INNER * LAYERS
            yield Workload(
                name=f"{name}/{rows}", device=device, check=check, baseline="one by one",
                params={"rows": rows, "inner": INNER, "outputs": list(sizes), "layers": LAYERS},
                arms=[
                    Arm(name=arm, fn=recorded(run), bytes=2 * count)
                    for arm, run in arms.items()
                ],
            )  # fmt: skip
