"""The tour's step of slimmoe: a mixture of experts, a smaller one, and what training gives back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold import plots
from tenfold.step import Context, Metric, Plot, StepFailed, StepResult, Table

if TYPE_CHECKING:
    import torch

_LENGTH = 128


class SlimmoeStep:
    """Trains a small mixture of experts on Python's own sources, compresses and distils it."""

    name = "slimmoe"
    title = "a mixture of experts, made smaller"

    def run(self, context: Context) -> StepResult:
        """Compare a compressed student with one that begins at random."""
        import torch
        from slimmoe import CompressionConfig, calibrate, compress, compress_model, plan, sizes
        from transformers import AutoModelForCausalLM

        teacher_steps, student_steps = (12, 6) if context.quick else (400, 100)
        data, held = _texts()
        context.progress(0.0, "training a teacher")
        begin = time.perf_counter()
        teacher = _teacher()
        _train(teacher, data, teacher_steps, 2e-3)
        seconds = time.perf_counter() - begin
        source, smaller = context.folder / "teacher", context.folder / "student"
        teacher.save_pretrained(source)
        context.progress(0.6, "calibration, plan, compression")
        begin = time.perf_counter()
        statistics = calibrate(teacher, data[:64], progress=False)
        options = CompressionConfig(num_experts=8, num_layers=3, hidden_size=96)
        decided = plan(teacher, statistics, options)
        compress(source, smaller, plan=decided, progress=False)
        compressing = time.perf_counter() - begin
        student = AutoModelForCausalLM.from_pretrained(smaller)
        same = compress_model(teacher, decided).state_dict()
        if not all(torch.equal(t, same[name]) for name, t in student.state_dict().items()):
            raise StepFailed("what was streamed is not what was compressed in memory")
        torch.manual_seed(0)
        chance = AutoModelForCausalLM.from_config(student.config)
        losses = {"teacher": _loss(teacher, held), "compressed": _loss(student, held),
                  "as large, at random": _loss(chance, held)}  # fmt: skip
        lines = {}
        for number, (name, model) in enumerate((("compressed", student),
                                                ("as large, at random", chance))):  # fmt: skip
            context.progress(0.65 + 0.15 * number, f"distilling: {name}")
            lines[name] = self._distilled(context, model, teacher, data, student_steps, name)
            losses[f"{name}, distilled"] = _loss(model, held)
        if not context.quick:
            ours, plain = losses["compressed, distilled"], losses["as large, at random, distilled"]
            if ours >= plain:
                raise StepFailed(f"compressed and distilled {ours:.3f}, from random {plain:.3f}")
        large, small = sizes(source), sizes(smaller)

        def draw(axes: Any) -> None:
            for name, values in lines.items():
                axes.plot(range(1, len(values) + 1), values, label=name)
            axes.axhline(losses["teacher"], color="grey", linestyle=":", label="teacher")
            axes.set_xlabel("steps of distillation")
            axes.set_ylabel("nats per byte, on what is trained on")
            axes.legend()

        return StepResult(
            headline=(
                f"{small.parameters / large.parameters:.0%} of the parameters: "
                f"{losses['compressed, distilled']:.2f} nats per byte on other files after "
                f"{student_steps} steps of distillation, "
                f"{losses['as large, at random, distilled']:.2f} from random weights, "
                f"{losses['teacher']:.2f} of the teacher"
            ),
            text=(
                "A mixture of 16 experts is trained on bytes of Python's own standard library for "
                "a minute. It then loses a layer, a quarter of its channels and half of its "
                "experts: the more important ones stay as they are, and every other one is "
                "averaged into the one that is most like it. What comes out is a folder that plain "
                "transformers loads. It is then distilled from the model that it was made of, and "
                "so is one of its size with random weights, on the same texts.",
                "A minute's teacher has learnt little, and so has its student: what is shown is "
                "what the beginning is worth, not how good the end can be.",
            ),
            metrics=(
                Metric("nats per byte, distilled", losses["compressed, distilled"], "",
                       losses["as large, at random, distilled"], "from random weights", digits=3),
                Metric("calibration, plan and compression", compressing, "s", seconds,
                       "training the teacher"),
                Metric("parameters", small.parameters, "", large.parameters, "of the teacher",
                       digits=0),
            ),
            tables=(
                Table("On files that none was trained on", ("model", "nats per byte"), tuple(
                    (name, f"{loss:.3f}") for name, loss in losses.items()
                )),
            ),
            plots=(
                Plot("What the beginning is worth", plots.svg(draw, title="Loss"),
                     "The compressed student begins where the random one does not come to."),
            ),
        )  # fmt: skip

    @staticmethod
    def _distilled(
        context: Context, model: Any, teacher: Any, data: torch.Tensor, steps: int, name: str
    ) -> list[float]:
        from slimmoe.distillation import DistillationArguments, DistillationTrainer

        args = DistillationArguments(
            str(context.folder / name.replace(",", "").replace(" ", "-")), max_steps=steps,
            per_device_train_batch_size=16, learning_rate=2e-3, lr_scheduler_type="cosine",
            warmup_steps=steps // 10, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True, log_level="error",
        )  # fmt: skip
        dataset: Any = [{"input_ids": row} for row in data]
        trainer = DistillationTrainer(model, teacher, args, train_dataset=dataset)
        # the report shows what is logged
        trainer.remove_callback(_printer())
        trainer.train()
        return [told["lm"] for told in trainer.state.log_history if "lm" in told]


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


def _texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Return bytes of the standard library's modules, to train on and of other files."""
    import ast

    import torch

    folder = Path(ast.__file__).parent
    files = sorted(file for file in folder.glob("*.py") if file.stat().st_size > 10_000)

    def rows(some: list[Path]) -> torch.Tensor:
        joined = bytearray(b"".join(file.read_bytes() for file in some))
        size = len(joined) // _LENGTH * _LENGTH
        return torch.frombuffer(joined[:size], dtype=torch.uint8).view(-1, _LENGTH).long()

    draws = torch.Generator().manual_seed(0)
    data, held = rows(files[::2]), rows(files[1::20])
    order = torch.randperm(len(data), generator=draws)
    return data[order], held[torch.randperm(len(held), generator=draws)[:64]]


def _teacher() -> Any:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, moe_intermediate_size=64, num_hidden_layers=4,
        num_experts=16, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32,  # ty: ignore[unknown-argument]
        max_position_embeddings=256, norm_topk_prob=True, router_aux_loss_coef=0.01,
        bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip


def _train(model: Any, data: torch.Tensor, steps: int, rate: float) -> None:
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for step in range(steps):
        ids = data[torch.arange(step * 16, step * 16 + 16) % len(data)]
        loss = model(ids, labels=ids, output_router_logits=True, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _loss(model: Any, held: torch.Tensor) -> float:
    import torch

    model.eval()
    with torch.no_grad():
        return float(model(held, labels=held, use_cache=False).loss)


STEP = SlimmoeStep()
