"""Sampling a group beside `generate` of transformers, as TRL calls it by default.

On a GPU: Qwen3-1.7B's shape with random weights in bfloat16, so times and bytes say something and
texts do not. Lengths are forced, and are measured ones: those of SmolLM2's answers in
``tests/scheduling/smollm2_lengths.json``, scaled to the workload's longest. `generate` goes on
until the longest is done, as it does when rows end by themselves.

FlashAttention-3 takes part if transformers finds it. The forward kernels of the wheel ``fa3-fwd``
will do, beside a module ``flash_attn_interface`` that imports all of ``fa3_fwd_interface`` and
belongs to a distribution of the name ``flash-attn-3``.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from shared_kernels.bench import Arm, Workload, benchmark

MEASURED = Path(__file__).parent.parent / "tests" / "scheduling" / "smollm2_lengths.json"
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936,
    "tie_word_embeddings": True, "max_position_embeddings": 40960,
}  # fmt: skip
KV_PER_TOKEN = 2 * 28 * 8 * 128 * 2


def lengths(count, longest):
    """Measured lengths, scaled so that the cap of 512 becomes ``longest``."""
    found = np.concatenate(list(json.loads(MEASURED.read_text())["groups"]))
    drawn = np.random.default_rng(0).choice(found, count)
    return np.maximum(1, np.ceil(drawn * longest / 512)).astype(int).tolist()


def make_model(device):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()
        torch.set_default_dtype(default)
    return model


def sampler_of(model, **config):
    from infsampling import InfiniteSampler, SamplingConfig

    return InfiniteSampler(model, SamplingConfig(eos_token_id=(2,), policy="lpt", **config))


def sibling(sampler):
    """Another sampler of the model, with buffers of its own and what was compiled for the first."""
    sampler._step_forward()
    made = copy.copy(sampler)
    made._engine = None
    return made


def oracle(forced):
    from infsampling import OracleLengths

    return OracleLengths([forced])


def plain(model, prompt, count, tokens):
    """What TRL does by default: the prompt once for each sample, and a mask."""
    ids = torch.tensor([prompt] * count, device=model.device)
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip


def continuous(model, prompt, forced, attention):
    """The scheduler of transformers with its CUDA graphs, set up for the call, as TRL does it."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = ContinuousBatchingConfig(
        max_requests_per_batch=len(forced), max_memory_percent=0.5, use_cuda_graph=True,
        q_padding_interval_size=64, kv_padding_interval_size=2048,
        # the wheel's kernels read no block tables
        max_blocks_per_request=0 if "flash" in attention else None,
    )  # fmt: skip
    generation = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1,
        max_new_tokens=max(forced),
    )  # fmt: skip
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config, block=True, timeout=5
        ) as manager:
            for length in forced:
                manager.add_request(prompt, max_new_tokens=length)
            ended = {}
            while len(ended) < len(forced):
                output = manager.get_result(timeout=60)
                if output is None:
                    raise RuntimeError("the server stopped")
                if output.is_finished():
                    ended[output.request_id] = len(output.generated_tokens)
    finally:
        model.set_attn_implementation(before)
    if sorted(ended.values()) != sorted(forced):
        raise RuntimeError(f"lengths of {sorted(ended.values())} for {sorted(forced)}")


def peak(sampler, run):
    """Bytes on top of what was there before, with nothing held from an earlier call."""
    sampler._engine = None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def group(name, device, count, prompt, longest, slots, peers=()):
    """A whole group: peers, else `generate`, and the sampler with these slots."""
    model = make_model(device)
    ids = list(range(1000, 1000 + prompt))
    forced = lengths(count, longest)

    def arm(places):
        sampler = sampler_of(model, max_slots=places, max_new_tokens=longest)
        sampler.length_predictor = oracle(forced)

        def run():
            return sampler.generate([ids], count, forced_lengths=forced)

        return sampler, run

    arms = {places: arm(places) for places in slots}
    others = {
        f"continuous batching, {attention}": lambda a=attention: continuous(model, ids, forced, a)
        for attention in peers
    } or {"generate": lambda: plain(model, ids, count, max(forced))}

    def check():
        for _, run in arms.values():
            found = run()
            assert [len(tokens) for tokens in found.completion_ids] == forced
            assert found.stats.prefill_tokens == prompt
            assert run().stats.graph_captures == 0

    yield Workload(
        name=name, device=device, check=check, baseline=next(iter(others)), clock="wall",
        params={
            "samples": count, "prompt": prompt, "longest": max(forced), "tokens": sum(forced),
            "shape": "Qwen3-1.7B",
            # an arm's own peak does not show the buffers that a sampler keeps between calls
            "peak_bytes": {
                str(places): peak(sampler, run) for places, (sampler, run) in arms.items()
            },
            "steps": {str(places): run().stats.decode_steps for places, (_, run) in arms.items()},
        },
        arms=[
            *(Arm(name=other, fn=fn) for other, fn in others.items()),
            *(Arm(name=f"infsampling, {places} slots", fn=run)
              for places, (_, run) in arms.items()),
        ],
    )  # fmt: skip


@benchmark
def rollout(device):
    """64 samples of at most 256 tokens."""
    if device == "cpu":
        return
    yield from group("rollout/64", device, 64, 256, 256, (64,))


@benchmark
def peers(device):
    """The same group beside continuous batching of transformers."""
    if device == "cpu":
        return
    from transformers.utils.import_utils import is_flash_attn_3_available

    attentions = ["paged|sdpa"]
    if is_flash_attn_3_available():
        attentions.append("paged|flash_attention_3")
    yield from group("peers/64", device, 64, 256, 256, (64,), attentions)


@benchmark
def memory(device):
    """32 samples of at most 1024 tokens, in the slots that cost no steps."""
    if device != "cpu":
        from infsampling.scheduling import free_slots

        slots = free_slots([n - 1 for n in lengths(32, 1024)])
        yield from group("memory/32", device, 32, 256, 1024, (slots,))


@benchmark
def step(device):
    """One step at a mean of 500 tokens a slot, beside a copy of the bytes that it must move."""
    if device == "cpu":
        return
    model = make_model(device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids, tokens = list(range(1000, 1256)), 1000
    for slots in (32, 64):
        sampler = sampler_of(model, max_slots=slots, max_new_tokens=1024)
        floor = weights + (len(ids) + slots * tokens // 2) * KV_PER_TOKEN
        # a copy reads one half and writes the other
        source = torch.ones(floor // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)

        def run(sampler=sampler, slots=slots):
            found = sampler.generate([ids], slots, forced_lengths=[tokens] * slots).stats
            return found.decode_seconds / found.decode_steps

        def copy(source=source, target=target):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(20):
                target.copy_(source)
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 20e3

        def check(sampler=sampler, run=run):
            assert run() > 0
            assert sampler._engine._graphs

        yield Workload(
            name=f"step/{slots}", device=device, check=check, baseline="copy", clock="returned",
            params={"slots": slots, "prompt": len(ids), "mean_tokens": tokens // 2,
                    "shape": "Qwen3-1.7B"},
            arms=[Arm(name="copy", fn=copy, bytes=floor), Arm(name="step", fn=run, bytes=floor)],
        )  # fmt: skip


@benchmark
def prompt(device):
    """A step of 64 slots on one prompt of 8192 tokens, and on 64 prompts of that length."""
    if device == "cpu":
        return
    model, tokens, count = make_model(device), 128, 64
    shared = [i % 1000 for i in range(8192)]
    private = [[5000 + number, *shared[1:]] for number in range(count)]
    samplers = {1: sampler_of(model, max_slots=count, max_new_tokens=tokens)}
    samplers[count] = sibling(samplers[1])

    def run(prompts):
        found = (
            samplers[len(prompts)]
            .generate(prompts, count // len(prompts), forced_lengths=[tokens] * count)
            .stats
        )
        assert found.prefill_tokens == 8192 * len(prompts)
        return found.decode_seconds / found.decode_steps

    def check():
        assert run([shared]) > 0
        assert run(private) > 0

    yield Workload(
        name="prompt/8k", device=device, check=check, baseline="private", clock="returned",
        params={"slots": count, "prompt": 8192, "tokens": tokens, "shape": "Qwen3-1.7B"},
        arms=[Arm(name="private", fn=lambda: run(private)),
              Arm(name="shared", fn=lambda: run([shared]))],
    )  # fmt: skip


@benchmark
def many(device):
    """Seconds a token of 64 and of 4096 samples in 64 slots."""
    if device == "cpu":
        return
    model, longest = make_model(device), 128
    ids = list(range(1000, 1256))
    forced = {count: lengths(count, longest) for count in (64, 4096)}
    samplers = {64: sampler_of(model, max_slots=64, max_new_tokens=longest)}
    samplers[4096] = sibling(samplers[64])

    def run(count):
        sampler = samplers[count]
        sampler.length_predictor = oracle(forced[count])
        found = sampler.generate([ids], count, forced_lengths=forced[count]).stats
        return (found.prefill_seconds + found.decode_seconds) / found.new_tokens

    def check():
        assert all(run(count) > 0 for count in forced)

    yield Workload(
        name="many/4096", device=device, check=check, baseline="64 samples", clock="returned",
        params={
            "slots": 64, "prompt": 256, "longest": longest, "shape": "Qwen3-1.7B",
            "peak_bytes": {
                str(count): peak(samplers[count], lambda count=count: run(count))
                for count in forced
            },
        },
        arms=[Arm(name=f"{count} samples", fn=lambda count=count: run(count)) for count in forced],
    )  # fmt: skip
