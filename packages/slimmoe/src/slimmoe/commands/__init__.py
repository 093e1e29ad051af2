"""Commands of ``slimmoe`` that have a file of their own; `slimmoe.cli` has the others."""
