"""What a folder of a circuit tells its readers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from pahq.circuit import Circuit

_TAGS = ["circuit-discovery", "mechanistic-interpretability", "mib-bench"]
#: What of a circuit's provenance is told, in words.
_TOLD = {
    "method": "method", "task": "task", "task_fingerprint": "fingerprint of the task",
    "threshold": "threshold", "metric": "metric", "ablation": "ablation",
    "direct_edges": "direct edges", "ig_steps": "steps of integrated gradients",
    "value": "metric of the circuit", "tested": "removals that were tried",
    "skipped": "removals that needed no run", "precision": "precision of differences",
    "checked": "decisions made again in full precision", "weights": "fingerprint of the weights",
}  # fmt: skip


def card(circuit: Circuit) -> str:
    """Return a model card of a circuit, in Markdown with metadata of the Hugging Face Hub."""
    found = circuit.provenance
    data = ModelCardData(library_name="pahq", tags=_TAGS)
    of = f" of a {found['model']}" if found.get("model") else ""
    rows = [f"| {words} | {found[name]} |" for name, words in _TOLD.items()
            if found.get(name) not in (None, "")]  # fmt: skip
    text = f"""---
{data.to_yaml()}
---
# A circuit{of}

{len(circuit):,} of {circuit.graph.edges:,} edges between embeddings, heads, MLPs and logits.

```python
from pahq import Circuit

circuit = Circuit.from_pretrained("this folder, or its name on the Hub")
```

| | |
|---|---|
{chr(10).join([f"| edges | {len(circuit):,} |", *rows])}

Heads share keys: {"yes" if circuit.graph.group > 1 else "no"}. A circuit is evidence about the
inputs that it was found on: judge it on others, beside circuits of its size drawn at random.
"""
    return str(ModelCard(text))
