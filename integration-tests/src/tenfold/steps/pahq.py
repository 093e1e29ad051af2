"""The tour's step of pahq: which edges of SmolLM2 see who is given something."""

from __future__ import annotations

import time
from typing import Any

from tenfold import plots
from tenfold.step import Context, Metric, Plot, StepFailed, StepResult, Table


class PahqStep:
    """Finds a circuit by ACDC, and judges it beside others of its size on other sentences."""

    name = "pahq"
    title = "the edges that a behaviour needs"

    def run(self, context: Context) -> StepResult:
        """Search, compare with scores by gradients and with chance."""
        import torch
        from pahq import Circuit, CircuitFinder, drawing, tasks
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from tenfold.assets import smollm2

        context.progress(0.0, "loading SmolLM2")
        tokenizer: Any = AutoTokenizer.from_pretrained(smollm2())
        model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
        threshold = 0.5 if context.quick else 0.05
        task, held = tasks.ioi(tokenizer, 2), tasks.ioi(tokenizer, 8, seed=1)
        finder = CircuitFinder(model)
        context.progress(0.1, "ACDC")
        begin = time.perf_counter()
        found = finder.acdc(task, threshold, progress=False)
        seconds = time.perf_counter() - begin
        tested, batches = found.provenance["tested"], found.provenance["batches"]
        context.progress(0.75, "scores by gradients, and chance")
        begin = time.perf_counter()
        scored = finder.eap(task, ig_steps=5)
        gradient_seconds = time.perf_counter() - begin
        with torch.no_grad():
            model(task.clean)
            begin = time.perf_counter()
            model(task.clean)
            forward = time.perf_counter() - begin
        size = len(found)
        edges = torch.from_numpy(finder.graph.full()).nonzero()
        draws = torch.Generator().manual_seed(0)
        random = []
        for _ in range(1 if context.quick else 4):
            chosen = edges[torch.randperm(len(edges), generator=draws)[:size]]
            present = torch.zeros_like(found.present)
            present[chosen[:, 0], chosen[:, 1]] = True
            random.append(Circuit(finder.graph, present, scored.scores))
        judged = {
            "ACDC": [finder.evaluate(found, held, ("kl",))["kl"]],
            "EAP-IG, as many edges": [finder.evaluate(scored.top(size), held, ("kl",))["kl"]],
            "as many edges by chance": [finder.evaluate(c, held, ("kl",))["kl"] for c in random],
        }
        recovered = {
            name: sum(one["recovered"] for one in many) / len(many) for name, many in judged.items()
        }
        chance = recovered["as many edges by chance"]
        if not context.quick and recovered["ACDC"] <= chance:
            raise StepFailed(f"{size} edges recover {recovered['ACDC']:.3f}, chance {chance:.3f}")
        names = list(recovered)
        strongest = sorted(
            found.present.nonzero().tolist(), key=lambda edge: -float(found.scores[tuple(edge)])
        )[:12]

        def draw(axes: Any) -> None:
            axes.barh(names[::-1], [100 * recovered[name] for name in names[::-1]])
            axes.set_xlabel("% of the KL divergence recovered, on other sentences")

        return StepResult(
            headline=(
                f"{size} of {finder.graph.edges:,} edges recover {recovered['ACDC']:.0%} of the "
                f"KL divergence on other sentences; {tested:,} removals in {batches} batches"
            ),
            text=(
                "In sentences like “When Anna and Tom went to the store, Tom gave a drink to”, "
                "SmolLM2-135M-Instruct says who is given something. Every edge between its "
                "embeddings, heads, MLPs and logits is removed in turn, that is, carries what it "
                "carries on a sentence about other people, and stays removed if the model's "
                f"prediction moves by less than {threshold} nats. The decisions are those of "
                "removing one edge at a time; here many are decided at once, and only what follows "
                f"the edge runs. {found.provenance['skipped']:,} edges needed no run at all.",
                "The threshold is high and the sentences are two, so that this takes less than a "
                "minute: a circuit for study wants lower and more. It is judged on eight other "
                "sentences.",
            ),
            metrics=(
                Metric("KL recovered", 100 * recovered["ACDC"], "%", 100 * chance,
                       "as many edges by chance"),
                Metric("search", seconds, "s", tested * forward,
                       "one run of the model for each removal, from the time of one"),
                Metric("scores of all edges by gradients", gradient_seconds, "s"),
                Metric("edges kept", size, digits=0),
            ),
            tables=(
                Table("Edges that matter most", ("edge", "KL that its removal adds"), tuple(
                    (finder.graph.name(*edge), f"{float(found.scores[tuple(edge)]):.3f}")
                    for edge in strongest
                )),
            ),
            plots=(
                Plot("The circuit", drawing.to_svg(found),
                     "Edges into queries, keys and values in three colours, their width by what "
                     "their removal adds."),
                Plot("What circuits of one size recover", plots.svg(draw, title="Recovered"),
                     "ACDC chose these edges on two sentences; the others have as many."),
            ),
        )  # fmt: skip


STEP = PahqStep()
