"""Our engine against the authors' zo2 (github.com/liangyuwang/zo2), on the authors' own model.

Both train the nanoGPT model of that repository, with the same shape, dtype and tokens: theirs
through its optimizer built into the model, ours through the plain model class. Set ZO2_AUTHORS to
a checkout of the repository:

    git clone https://github.com/liangyuwang/zo2 authors-zo2
    ZO2_AUTHORS=authors-zo2 python -m shared_kernels.bench packages/zo2/benchmarks/authors.py
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from shared_kernels.bench import Arm, Workload, benchmark

SHAPE = {"opt_1_3b": (24, 32, 2048), "opt_2_7b": (32, 32, 2560), "opt_6_7b": (32, 32, 4096)}

EVERYTHING = (r"transformer\.h\.\d+", r"transformer\.wte", "lm_head")


@benchmark
def nanogpt(device):
    if device == "cpu":
        return
    for dtype, tokens in (
        (torch.bfloat16, 2048),
        (torch.bfloat16, 512),
        (torch.float32, 2048),
    ):
        yield _workload(device, "opt_2_7b", dtype, tokens)
        gc.collect()
        torch.cuda.empty_cache()


def _authors():
    """Import the repository's modules under another name, past a package root that needs an
    older transformers."""
    root = os.environ.get("ZO2_AUTHORS")
    if not root or not (Path(root) / "zo2").is_dir():
        raise FileNotFoundError(
            f"expected a checkout of github.com/liangyuwang/zo2 in ZO2_AUTHORS, got {root!r}"
        )
    if "authors_zo2" not in sys.modules:
        for name, folder in (("authors_zo2", "zo2"), ("authors_zo2.model", "zo2/model")):
            package = types.ModuleType(name)
            package.__path__ = [str(Path(root) / folder)]
            sys.modules[name] = package
    model = importlib.import_module("authors_zo2.model.nanogpt.model")
    trained = importlib.import_module("authors_zo2.model.nanogpt.mezo_sgd.zo2")
    config = importlib.import_module("authors_zo2.config.mezo_sgd")
    return model, trained.GPT, config.MeZOSGDConfig


@contextmanager
def _no_init(dtype):
    """Leave weights uninitialised: billions of CPU draws would take minutes."""
    names = [n for n in vars(torch.nn.init) if n.endswith("_") and not n.startswith("_")]
    saved = {n: getattr(torch.nn.init, n) for n in names}
    before = torch.get_default_dtype()
    try:
        for name in names:
            setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
        torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(before)
        for name, value in saved.items():
            setattr(torch.nn.init, name, value)


def _randomize(model, device):
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, device=device).mul_(0.02))


def _rss():
    gc.collect()
    return psutil.Process().memory_info().rss


def _workload(device, name, dtype, tokens):
    from zo2 import OffloadConfig, ZOConfig, prepare

    module, theirs_class, config_class = _authors()
    layers, heads, hidden = SHAPE[name]
    shape = module.GPTConfig(n_layer=layers, n_head=heads, n_embd=hidden, block_size=2048)
    data = torch.randint(0, shape.vocab_size, (1, tokens + 1), device=device)
    ids, labels = data[:, :-1], data[:, 1:]
    positions = torch.arange(tokens, device=device).unsqueeze(0)

    def randomly(cls, *args):
        with _no_init(dtype):
            model = cls(shape, *args)
        _randomize(model, device)
        return model

    memory, arms = {}, []

    def add(name, build):
        """Build an arm, run two steps, and note what it holds on the device and on the host."""
        torch._C._host_emptyCache()
        rss, before = _rss(), torch.cuda.memory_allocated()
        step = build()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        memory[f"{name}, GPU peak"] = torch.cuda.max_memory_allocated() - before
        memory[f"{name}, host bytes"] = _rss() - rss
        arms.append(Arm(name=name, fn=step))

    def theirs():
        model = randomly(
            theirs_class, config_class(lr=1e-7, weight_decay=0.0, eps=1e-3, working_device=device)
        )
        model.zo_train()
        return lambda: model(ids, positions, labels)

    objective = lambda m: m(ids, positions, labels)[1]  # noqa: E731
    store = "bf16" if dtype is torch.bfloat16 else "fp32"
    engines = []

    def ours(**kwargs):
        offload = OffloadConfig(store=store, **kwargs)
        engines.append(prepare(randomly(module.GPT), ZOConfig(), offload, device=device))
        return lambda engine=engines[-1]: engine.step(objective, lr=1e-7)

    add("authors' zo2", theirs)
    add("zo2, written back at every step", lambda: ours(fold_every=1))
    # 32-bit weights are written back at every step in any case.
    if store == "bf16":
        add("zo2", ours)
    add("zo2, embeddings streamed too", lambda: ours(blocks=EVERYTHING, prefetch=1))

    def check():
        assert all(torch.isfinite(engine.estimate(objective).loss) for engine in engines)

    size = sum(p.numel() for p in engines[0].model.parameters())
    return Workload(
        name=f"nanoGPT/{name} {str(dtype).removeprefix('torch.')} {tokens} tokens",
        params={"parameters": size, "tokens": tokens, "dtype": str(dtype), **memory},
        device=device,
        clock="wall",
        baseline="authors' zo2",
        check=check,
        arms=arms,
    )
