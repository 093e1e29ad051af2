"""How good scores are: against training again, and against labels that are known to be wrong."""

from sam_if.evaluate.agreement import Agreement, Difference
from sam_if.evaluate.auroc import AUROCResult, auroc
from sam_if.evaluate.farm import retrain_together
from sam_if.evaluate.lds import LDSResult, lds
from sam_if.evaluate.loo import LOOResult, loo

__all__ = [
    "AUROCResult",
    "Agreement",
    "Difference",
    "LDSResult",
    "LOOResult",
    "auroc",
    "lds",
    "loo",
    "retrain_together",
]
