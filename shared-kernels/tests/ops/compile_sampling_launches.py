"""Compile every launch of the sampling kernels for Hopper: see test_compile.py."""

import json

import torch
from compiling import compiling
from shared_kernels.ops.sampling import SlotState, launch

if __name__ == "__main__":
    with compiling() as seen:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            logits = torch.empty(3, 5000, dtype=dtype)
            keys, index = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
            for limit in (None, torch.zeros(3)):
                for temperature in (0.0, 0.7):
                    launch.gumbel_sample(logits, keys, index, limit, temperature)
        for slots in (1, 64, 256):
            state = SlotState.empty(slots, 9, 7)
            token = torch.zeros(slots, dtype=torch.int64)
            for record in (True, False):
                launch.slot_refill_(
                    *(getattr(state, name) for name in ("slots", "rows", "queue", "counters")),
                    state.order, state.tiles, state.tokens, state.logprobs, token, token.float(),
                    token[:1], slots, 16, record,
                )  # fmt: skip
    print(json.dumps(sorted(seen)))
