"""Continuous batching of transformers with and without predicted lengths, on one GPU.

64 requests wait for 16 places. Lengths are those of real answers of SmolLM2-135M-Instruct to
test prompts, replayed: a request ends after as many tokens as its answer had, which the scheduler
does not see. It sees predictions of a predictor trained on other prompts (the store of the tour).
Prompts are random tokens of the real number, and weights those of SmolLM2's shape at random: what
is made does not matter, only when. ``shuffled`` gives each request another's prediction.

Run: ``python benchmarks/serving.py STORE OUT.json`` (with shared-kernels and forelen on the path).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

SLOTS, REQUESTS = 16, 64


def model(device):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, torch.bfloat16).eval()


def predictor(found):
    from forelen.training import calibrate, default_arguments, train

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        arguments = default_arguments(
            folder, True, num_train_epochs=6, weight_decay=0.1, disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        made = train(
            found.split("train"), output_dir=folder, validation=found.split("validation"),
            arguments=arguments, dropout=0.3,
        )  # fmt: skip
    return calibrate(made, found.split("calibration"))


def serve(net, scheduler, prompts, lengths, law, aging):
    from forelen.schedule import LengthTable, check_live, scheduled
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = ContinuousBatchingConfig(
        scheduler_type=scheduler, max_requests_per_batch=SLOTS, allow_block_sharing=False,
        max_batch_tokens=256, num_blocks=8 * SLOTS, use_cuda_graph=True,
        q_padding_interval_size=64, kv_padding_interval_size=2048,
    )  # fmt: skip
    generation = GenerationConfig(max_new_tokens=512, do_sample=False, eos_token_id=-1)
    table = LengthTable(aging=aging)
    table.put(prompts, law)
    torch.cuda.synchronize()
    with (
        scheduled(table),
        net.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config, block=True, timeout=5
        ) as manager,
    ):
        ended, began = {}, time.perf_counter()
        names = [
            manager.add_request(ids, max_new_tokens=int(length))
            for ids, length in zip(prompts, lengths, strict=True)
        ]
        while len(ended) < len(prompts):
            output = manager.get_result(timeout=60)
            if output is None:
                raise RuntimeError("the server stopped")
            if output.is_finished():
                ended[output.request_id] = output
        if scheduler != "fifo":
            check_live(manager, scheduler)
    assert [len(ended[n].generated_tokens) for n in names] == [int(x) for x in lengths]
    done = np.array([ended[name].lifespan[1] - began for name in names])
    start = np.array([ended[name].lifespan[0] - began for name in names])
    return {
        "makespan": float(done.max()), "mean_completion": float(done.mean()),
        "p99_completion": float(np.quantile(done, 0.99)), "longest_wait": float(start.max()),
    }  # fmt: skip


def main():
    from forelen import Bins, LengthDistribution
    from forelen.dataset import LengthDataset
    from forelen.store import FeatureStore
    from forelen.training import predict_rows
    from shared_kernels.bench import describe_run

    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found = FeatureStore(arguments.store).load()
    head, test = predictor(found), found.split("test")
    siblings = test.lengths.shape[1]
    rows = LengthDataset(test, head.config, steps=False)
    net = model("cuda")
    warm = [[3 + n] * 40 for n in range(SLOTS)]
    one = predict_rows(head, rows, chosen=torch.arange(SLOTS))
    serve(net, "fifo", warm, [16] * SLOTS, one, aging=20.0)
    rng = np.random.default_rng(0)
    arms = {
        "fifo": "fifo", "longest first": "forelen_lpt", "shortest first": "forelen_sjf",
        "longest first, shuffled": "forelen_lpt",
        "longest first, true lengths": "forelen_lpt",
    }  # fmt: skip
    results = {name: [] for name in arms}
    for number in range(arguments.rounds):
        chosen = torch.tensor(rng.choice(len(test) * siblings, REQUESTS, replace=False))
        lengths = test.lengths.flatten()[chosen].numpy()
        counts = test.prompt_tokens[chosen // siblings].tolist()
        prompts = [rng.integers(3, 49000, n).tolist() for n in counts]
        law = predict_rows(head, rows, chosen=chosen)
        exact = Bins(tuple(map(float, range(513))))
        truth = LengthDistribution(torch.eye(512).double()[lengths - 1], exact)
        for name, scheduler in arms.items():
            known = truth if "true" in name else law
            if "shuffled" in name:
                known = law[torch.randperm(len(law)).tolist()]
            outcome = serve(net, scheduler, prompts, lengths, known, aging=20.0)
            results[name].append(outcome)
            print(number, name, {k: round(v, 2) for k, v in outcome.items()}, file=sys.stderr)
    summary = {}
    for name, outcomes in results.items():
        summary[name] = {
            key: {
                "median": statistics.median(o[key] for o in outcomes),
                "ratio_to_fifo": statistics.median(
                    o[key] / f[key] for o, f in zip(outcomes, results["fifo"], strict=True)
                ),
                "all": [o[key] for o in outcomes],
            }
            for key in outcomes[0]
        }
    document = {
        "workload": {
            "slots": SLOTS,
            "requests": REQUESTS,
            "rounds": arguments.rounds,
            "aging": 20.0,
        },
        **describe_run("python packages/forelen/benchmarks/serving.py STORE OUT"),
        "arms": summary,
    }
    arguments.out.write_text(json.dumps(document, indent=1, default=str) + "\n")
    for name, found_ in summary.items():
        print(name, {k: round(v["ratio_to_fifo"], 3) for k, v in found_.items()})


if __name__ == "__main__":
    main()
