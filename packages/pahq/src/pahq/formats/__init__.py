"""Circuits in the files of other programs, and with shared or separate keys.

``mib``: those of EAP-IG and of the circuit track of MIB. ``auto_circuit``: prune scores of
auto-circuit. Both know query heads only; ``heads`` turns a circuit of shared keys into one of
theirs, and back. What they hold is edges and scores: provenance stays with
`Circuit.save_pretrained`.
"""

from pahq.formats.auto_circuit import (
    from_auto_circuit,
    load_auto_circuit,
    save_auto_circuit,
    to_auto_circuit,
)
from pahq.formats.heads import grouped, per_query_head
from pahq.formats.mib import from_mib_json, from_mib_pt, to_mib_json, to_mib_pt

__all__ = [
    "from_auto_circuit",
    "from_mib_json",
    "from_mib_pt",
    "grouped",
    "load_auto_circuit",
    "per_query_head",
    "save_auto_circuit",
    "to_auto_circuit",
    "to_mib_json",
    "to_mib_pt",
]
