"""Compile every launch of the segment kernels for Hopper, and print the kernels' names."""

import json

import torch
from compiling import compiling
from shared_kernels.ops.dp import launch, wide
from shared_kernels.testing.segments import make_units


def over_descriptors(count, clipping):
    case = make_units([64] * count, 264, 136, torch.bfloat16)
    out, bias = case.outputs()
    threshold = torch.tensor(1.0)
    launch.gram_clip(case.a, case.g, case.cu, threshold, out, None, clipping, 0.01, 64, 64)
    launch.scaled_mm(case.a, case.g, case.cu, case.scale, out, None, 64)
    launch.mm_norm(case.a, case.g, case.cu, False, 64)
    launch.token_gram_norm(case.tokens, case.g, case.cu, 2, None)
    launch.mm_clip(
        case.a, case.g, case.cu, threshold, out, bias, clipping, 0.01, None, None, True, False
    )


def any_layout(dtype):
    case = make_units([17] * 3, 33, 65, dtype)
    out, bias = case.outputs()
    threshold = torch.tensor(1.0)
    launch._products = lambda x, y: torch.zeros(len(x), *out.shape)
    launch.choose = lambda op, kind, configs, run: configs[0]
    launch.gram_clip(case.a, case.g, case.cu, threshold, out, bias, "abadi", 0.01, 17, 1)
    launch.token_gram_norm(case.tokens, case.g, case.cu, 2, None)
    launch.mm_norm(case.a, case.g, case.cu, True, 1)
    launch.mm_clip(
        case.a, case.g, case.cu, threshold, out, bias, "abadi", 0.01, 1, None, True, True
    )
    launch.sums(case.g, case.g, case.cu)
    table = torch.zeros(6, 65)
    launch.embedding_accumulate(case.tokens, case.g, case.cu, case.scale, table, None)


if __name__ == "__main__":
    wide.capability = lambda device: (9, 0)
    with compiling() as seen:
        for count in (1, 3, 40):
            for clipping in ("abadi", "automatic"):
                over_descriptors(count, clipping)
        for dtype in (torch.bfloat16, torch.float32):
            any_layout(dtype)
        print(json.dumps(sorted(seen)))
