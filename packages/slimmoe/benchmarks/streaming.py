"""Compression from folder to folder: seconds beside those of reading and writing the same bytes.

The checkpoint has two layers of the shape of Qwen3-Next-80B-A3B with random weights, and random
statistics: they prove time and bytes, and nothing of a model. Its 512 experts become 256, half of
them averages, and 2048 channels 1536. Anonymous memory is that of a process of its own, with all
libraries in it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from shared_kernels.bench import Arm, Workload, benchmark

EXPERTS, HIDDEN, LAYERS = 512, 2048, 2
_CHUNK = 4 << 20


def checkpoint(folder):
    """Write a folder of the shape, tensor by tensor."""
    import torch
    from shared_kernels.checkpoint import TensorInfo, write_safetensors
    from transformers import AutoModelForCausalLM, Qwen3NextConfig
    from transformers.core_model_loading import revert_weight_conversion

    config = Qwen3NextConfig(
        vocab_size=151936, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_experts=EXPERTS,
        num_experts_per_tok=10, moe_intermediate_size=512, shared_expert_intermediate_size=512,
        num_attention_heads=16, num_key_value_heads=2, head_dim=256,
        layer_types=["linear_attention", "full_attention"], dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state = revert_weight_conversion(model, model.state_dict())
    infos = [TensorInfo(name, torch.bfloat16, tuple(t.shape)) for name, t in state.items()]
    noise = torch.randn(1 << 22).bfloat16() * 0.02

    def drawn(info):
        size = torch.Size(info.shape).numel()
        return noise.repeat(-(-size // len(noise)))[:size].view(info.shape)

    folder.mkdir()
    write_safetensors(folder / "model.safetensors", infos, map(drawn, infos))
    config.save_pretrained(folder)


def planned(folder):
    """Return a plan by random statistics."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import made
    from slimmoe import CompressionConfig, plan
    from slimmoe.weights import Source

    source = Source(folder)
    options = CompressionConfig(
        num_experts=EXPERTS // 2, num_experts_per_tok=8, hidden_size=1536,
        expert_method="partial_merge", similarity="router_weight",
    )  # fmt: skip
    return plan(source, made.statistics(source), options)


def compressed(folder, plan):
    """Compress a folder, and return the bytes of weights that came out."""
    from slimmoe.streaming import write

    target = folder.parent / "after"
    shutil.rmtree(target, ignore_errors=True)
    write(folder, target, plan, progress=False, max_shard_bytes=1 << 30)
    return sum(file.stat().st_size for file in target.glob("*.safetensors"))


def copied(folder, size):
    """Read all bytes of weights, and write as many as come out."""
    target = folder.parent / "copy"
    left = size
    with (folder / "model.safetensors").open("rb", buffering=0) as file, target.open("wb") as out:
        while part := file.read(_CHUNK):
            out.write(part[:left])
            left -= min(left, len(part))
        out.flush()
        os.fsync(out.fileno())
    target.unlink()


def anonymous():
    """Return bytes of this process that no file has."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def measured(folder, plan_file):
    """Compress, and print the most anonymous memory of this process, before and meanwhile."""
    import torch
    from slimmoe import CompressionPlan

    torch.set_num_threads(2)
    plan = CompressionPlan.load(plan_file)
    before, most, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    compressed(Path(folder), plan)
    done.set()
    watcher.join()
    print(json.dumps({"before": before, "most": most[0]}))


@benchmark
def streaming(device):
    """A slice of an 80B-shaped model."""
    if device != "cpu":
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "before"
        checkpoint(folder)
        plan = planned(folder)
        plan.save(Path(place) / "plan.json")
        command = [sys.executable, __file__, str(folder), str(Path(place) / "plan.json")]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        told = json.loads(ran.stdout)
        size = compressed(folder, plan)
        read = (folder / "model.safetensors").stat().st_size

        def check():
            from slimmoe import verify

            assert verify(folder.parent / "after")["tensors"] > 1500

        yield Workload(
            name="streaming/80b-slice", device=device, check=check, baseline="read and write",
            clock="wall",
            params={
                "layers": LAYERS, "experts": [EXPERTS, EXPERTS // 2], "hidden": [HIDDEN, 1536],
                "method": "partial_merge", "bytes read": read, "bytes written": size,
                "anonymous memory": {
                    "before": {"bytes": told["before"]}, "at most": {"bytes": told["most"]},
                },
            },
            arms=[Arm(name="read and write", fn=lambda: copied(folder, size), bytes=read + size),
                  Arm(name="slimmoe", fn=lambda: compressed(folder, plan), bytes=read + size)],
        )  # fmt: skip


if __name__ == "__main__":
    measured(*sys.argv[1:])
