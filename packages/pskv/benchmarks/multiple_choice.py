"""Ten-shot multiple choice on a CPU: lm-evaluation-harness's own model, and the same with pskv.

SmolLM2-135M in float32, capitals of eight countries with four options each. The harness runs at
the batch that a trial found fastest; both get the same token ids and give the same answers.
"""

from __future__ import annotations

import time

import torch
from shared_kernels.bench import Arm, Workload, benchmark

SHOTS = {
    "France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima", "Norway": "Oslo",
    "Egypt": "Cairo", "Cuba": "Havana", "Iraq": "Baghdad", "Austria": "Vienna", "Ghana": "Accra",
}  # fmt: skip
QUESTIONS = {
    "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Poland": "Warsaw",
    "Greece": "Athens", "Ireland": "Dublin", "Russia": "Moscow", "Finland": "Helsinki",
}  # fmt: skip


@benchmark
def multiple_choice(device):
    """All requests, scored by each."""
    if device != "cpu":
        return
    from lm_eval.models.huggingface import HFLM
    from pskv.integrations.lm_eval import SharedPrefixLM
    from tenfold.assets import smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    shots = "".join(f"The capital of {a} is {b}.\n" for a, b in SHOTS.items())
    cities = list(QUESTIONS.values())
    requests = []
    for number, country in enumerate(QUESTIONS):
        context = tokenizer(f"{shots}The capital of {country} is")["input_ids"]
        for shift in range(4):
            city = cities[(number + shift) % len(cities)]
            option = tokenizer(f" {city}", add_special_tokens=False)["input_ids"]
            requests.append(((country, city), context, option))
    options = {"pretrained": model, "tokenizer": tokenizer}
    harness = {batch: HFLM(**options, batch_size=batch) for batch in (1, 4, 16)}
    ours = SharedPrefixLM(**options, pskv_backend="split")

    def answers(lm):
        return lm._loglikelihood_tokens(requests, disable_tqdm=True)

    def seconds(lm):
        begin = time.perf_counter()
        answers(lm)
        return time.perf_counter() - begin

    answers(ours)
    batch = min(harness, key=lambda size: seconds(harness[size]))

    def check():
        pairs = zip(answers(harness[batch]), answers(ours), strict=True)
        return all(abs(a[0] - b[0]) < 1e-3 and a[1] == b[1] for a, b in pairs)

    yield Workload(
        name="multiple choice/10 shots, 8 questions, 4 options", baseline="lm-eval",
        check=check, device=device, clock="wall",
        params={"batch": batch, "requests": len(requests), "tokens": len(requests[0][1])},
        arms=[
            Arm(name="lm-eval", fn=lambda: answers(harness[batch])),
            Arm(name="lm-eval with pskv", fn=lambda: answers(ours)),
        ],
    )  # fmt: skip
