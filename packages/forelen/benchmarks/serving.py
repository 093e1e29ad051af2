"""Continuous batching of transformers with and without predicted lengths.

64 requests wait for 16 places. Lengths are those of real answers to test prompts of a store,
replayed: a request ends after as many tokens as its answer had, which the scheduler does not see.
It sees predictions of a predictor that was trained on other prompts of the store; two arms give
each request another's. Prompts are random tokens of the real number, and weights random: what is
made does not matter, only when.

Times are in seconds and in passes of the model, which do not depend on the machine; without a GPU
the model is a small one, and passes are what to look at.

Run: ``python benchmarks/serving.py STORE OUT.json`` (with shared-kernels and forelen on the path).
With a README instead of STORE, its table is filled from OUT.
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
from typing import ClassVar

import numpy as np
import torch
from study import fill_block

SLOTS, REQUESTS = 16, 64
CAP = 512
TURN = CAP // 3


def model(device):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = (512, 32, 64, 1, 2, 1) if device == "cpu" else (49152, 576, 1536, 30, 9, 3)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads")  # fmt: skip
    config = LlamaConfig(max_position_embeddings=8192, **dict(zip(names, shape, strict=True)))
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return LlamaForCausalLM(config).to(device, dtype).eval()


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


@contextlib.contextmanager
def counted():
    """Count the passes of a server within this, and at which each request began and ended."""
    from transformers.generation.continuous_batching import scheduler as theirs

    class Passes:
        total = 0
        began: ClassVar[dict[str, int]] = {}
        ended: ClassVar[dict[str, int]] = {}

    schedule, finish = theirs.FIFOScheduler.schedule_batch, theirs.Scheduler.finish_request
    Passes.began.clear()
    Passes.ended.clear()

    def schedule_batch(self, *args, **options):
        found = schedule(self, *args, **options)
        Passes.total += bool(found[0])
        for future in found[0] or ():
            Passes.began.setdefault(future.state.request_id, Passes.total)
        return found

    def finish_request(self, request_id, *args, **options):
        # the last time, if it was paused before
        Passes.ended[request_id] = Passes.total
        return finish(self, request_id, *args, **options)

    theirs.FIFOScheduler.schedule_batch = schedule_batch
    theirs.Scheduler.finish_request = finish_request
    try:
        yield Passes
    finally:
        theirs.FIFOScheduler.schedule_batch = schedule
        theirs.Scheduler.finish_request = finish


def serve(net, scheduler, prompts, lengths, law, aging):
    from forelen.schedule import LengthTable, check_live, plan_order, scheduled
    from transformers import ContinuousBatchingConfig, GenerationConfig

    graphs = {}
    if net.device.type == "cuda":
        # without them a pass of 5.17 took 100 ms on the machine of the results
        graphs = {"use_cuda_graph": True, "q_padding_interval_size": 64,
                  "kv_padding_interval_size": 2048}  # fmt: skip
    config = ContinuousBatchingConfig(
        scheduler_type=scheduler, max_requests_per_batch=SLOTS, allow_block_sharing=False,
        max_batch_tokens=256, num_blocks=8 * SLOTS, **graphs,
    )  # fmt: skip
    generation = GenerationConfig(max_new_tokens=CAP, do_sample=False, eos_token_id=-1)
    table = LengthTable(aging=aging, turn=TURN)
    order = plan_order(law, SLOTS, cap=CAP) if scheduler == "forelen_plan" else None
    table.put(prompts, law, order)
    with (
        scheduled(table),
        counted() as passes,
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
    at = np.array([passes.ended[name] for name in names])
    return {
        "makespan_passes": float(at.max()), "mean_completion_passes": float(at.mean()),
        "makespan": float(done.max()), "mean_completion": float(done.mean()),
        "p99_completion": float(np.quantile(done, 0.99)),
        "longest_wait_passes": float(max(passes.began[name] for name in names)),
        "pauses": float(table.pauses),
    }  # fmt: skip


def fill(readme, document):
    columns = {
        "makespan_passes": "all done, passes",
        "mean_completion_passes": "mean completion, passes",
        "makespan": "all done, s",
        "mean_completion": "mean completion, s",
        "longest_wait_passes": "longest wait, passes",
    }
    lines = [
        f"| order | {' | '.join(columns.values())} | pauses |",
        "|---|" + "--:|" * (len(columns) + 1),
    ]
    for name, row in document["arms"].items():
        cells = []
        pauses = statistics.median(row["pauses"])
        for key in columns:
            low, high = row[key]["ratio_interval"]
            cells.append(f"{row[key]['ratio']:.3f} ({low:.2f} to {high:.2f})")
        if name == "first come, first served":
            cells = [f"{row[key]['median']:.4g} = 1" for key in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {pauses:g} |")
    work, run = document["workload"], document["provenance"]
    machine = run["gpu"]["name"] if run.get("gpu") else "a CPU"
    lines += [
        "",
        f"Medians of {work['rounds']} queues, over first come, first served; {machine}; torch "
        f"{run['versions']['torch']}, transformers {run['versions']['transformers']}; commit "
        f"{(run['commit'] or '')[:12]}; {run['date'][:10]}.",
    ]
    fill_block(readme, "serving-gpu" if run.get("gpu") else "serving", lines)


def main():
    from forelen import Bins, LengthDistribution
    from forelen.dataset import LengthDataset
    from forelen.store import FeatureStore
    from forelen.training import predict_rows
    from shared_kernels.bench import describe_run
    from shared_kernels.files import write_text

    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--leave-out", nargs="*", default=[], help="arms that are not run")
    arguments = parser.parse_args()
    if arguments.store.suffix == ".md":
        fill(arguments.store, json.loads(arguments.out.read_text(encoding="utf-8")))
        return
    found = FeatureStore(arguments.store).load()
    head, test = predictor(found), found.split("test")
    siblings = test.lengths.shape[1]
    rows = LengthDataset(test, head.config, steps=False)
    net = model("cuda" if torch.cuda.is_available() else "cpu")
    warm = [[3 + n] * 40 for n in range(SLOTS)]
    one = predict_rows(head, rows, chosen=torch.arange(SLOTS))
    serve(net, "fifo", warm, [16] * SLOTS, one, aging=20.0)
    rng = np.random.default_rng(0)
    arms = {
        "first come, first served": "fifo",
        "by turns": "forelen_turns",
        "by turns, another's prediction": "forelen_turns",
        "planned": "forelen_plan",
        "shortest first": "forelen_sjf",
        "longest first": "forelen_lpt",
        "planned, another's prediction": "forelen_plan",
        "longest first, true lengths": "forelen_lpt",
    }
    arms = {name: kind for name, kind in arms.items() if name not in arguments.leave_out}
    results = {name: [] for name in arms}
    for number in range(arguments.rounds):
        chosen = torch.tensor(rng.choice(len(test) * siblings, REQUESTS, replace=False))
        lengths = test.lengths.flatten()[chosen].numpy()
        counts = test.prompt_tokens[chosen // siblings].tolist()
        prompts = [rng.integers(3, 500, n).tolist() for n in counts]
        law = predict_rows(head, rows, chosen=chosen)
        exact = Bins(tuple(map(float, range(CAP + 1))))
        truth = LengthDistribution(torch.eye(CAP).double()[lengths - 1], exact)
        for name in rng.permutation(list(arms)).tolist():
            scheduler = arms[name]
            known = truth if "true" in name else law
            if "another" in name:
                known = law[torch.randperm(len(law)).tolist()]
            outcome = serve(net, scheduler, prompts, lengths, known, aging=20.0)
            results[name].append(outcome)
            print(number, name, {k: round(v, 2) for k, v in outcome.items()}, file=sys.stderr)
    summary = {}
    base = results["first come, first served"]
    for name, outcomes in results.items():
        summary[name] = {}
        summary[name]["pauses"] = [outcome.pop("pauses") for outcome in outcomes]
        for key in outcomes[0]:
            ratios = [o[key] / f[key] for o, f in zip(outcomes, base, strict=True)]
            draws = np.random.default_rng(0).choice(ratios, (1000, len(ratios)))
            summary[name][key] = {
                "median": statistics.median(o[key] for o in outcomes),
                "ratio": statistics.median(ratios),
                "ratio_interval": np.quantile(np.median(draws, 1), [0.025, 0.975]).tolist(),
                "all": [o[key] for o in outcomes],
            }
    document = {
        "workload": {
            "slots": SLOTS,
            "requests": REQUESTS,
            "rounds": arguments.rounds,
            "aging": 20.0,
            "turn": TURN,
            "store": {key: found.header[key] for key in ("model", "sampling")},
        },
        "provenance": describe_run("packages/forelen/benchmarks/serving.py"),
        "arms": summary,
    }
    write_text(arguments.out, json.dumps(document, indent=1) + "\n")
    for name, found_ in summary.items():
        print(name, {k: round(v["ratio"], 3) for k, v in found_.items() if k != "pauses"},
              found_["pauses"])  # fmt: skip


if __name__ == "__main__":
    main()
