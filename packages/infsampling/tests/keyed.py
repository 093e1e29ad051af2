"""The sampler's draws through transformers' own `generate`: sequential sampling with our noise."""

import torch
from infsampling import InfiniteSampler, SamplingConfig
from infsampling.keys import prompt_uid, sample_keys
from shared_kernels.ops.sampling import gumbel_noise, logit_threshold


class KeyedNoise:
    """A logits processor that makes greedy decoding draw what the sampler draws."""

    def __init__(self, keys, start, *, temperature=1.0, **filters):
        self.keys, self.start, self.temperature, self.filters = keys, start, temperature, filters

    def __call__(self, input_ids, scores):
        z = scores / self.temperature
        limit = logit_threshold(scores, temperature=self.temperature, **self.filters)
        index = torch.full((len(scores),), input_ids.shape[1] - self.start, device=scores.device)
        noisy = z + gumbel_noise(self.keys, index, scores.shape[1])
        return noisy if limit is None else noisy.masked_fill(z < limit[:, None], float("-inf"))


def generate(model, ids, samples, config, eos, *, step=0, **options):
    """Return the tokens of these samples of a prompt, each until its end."""
    keys = sample_keys(config.seed, step, [prompt_uid(ids)] * len(samples), samples)
    filters = {"top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p}
    noise = KeyedNoise(keys, len(ids), temperature=config.temperature, **filters)
    found = model.generate(
        torch.tensor([ids] * len(samples)), do_sample=False, logits_processor=[noise],
        max_new_tokens=config.max_new_tokens, eos_token_id=list(eos), pad_token_id=0, **options,
    )[:, len(ids) :].tolist()  # fmt: skip
    return [until(line, eos) for line in found]


def share_that_parts(model, ids, count, tokens, slots):
    """Return how many samples differ between numbers of slots: only where two tokens nearly tie."""
    parted = 0
    base = SamplingConfig(max_slots=slots[0], max_new_tokens=tokens, eos_token_id=())
    first = InfiniteSampler(model, base).generate([ids], count)
    for places in slots[1:]:
        other = InfiniteSampler(model, base.replace(max_slots=places)).generate([ids], count)
        for sample, (a, b) in enumerate(
            zip(first.completion_ids, other.completion_ids, strict=True)
        ):
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
            if at is None:
                continue
            parted += 1
            keys = sample_keys(base.seed, 0, [prompt_uid(ids)], [sample]).to(model.device)
            line = torch.tensor([ids + a[:at]], device=model.device)
            with torch.no_grad():
                scores = model(line).logits[:, -1].float()
            noisy = KeyedNoise(keys, len(ids))(line, scores)[0]
            best = noisy.topk(2)
            assert {a[at], b[at]} == set(best.indices.tolist())
            assert float(best.values[0] - best.values[1]) < 0.05
    return parted / count / (len(slots) - 1)


def until(line, eos):
    ends = [place for place, token in enumerate(line) if token in eos]
    return line[: ends[0] + 1] if ends else line
