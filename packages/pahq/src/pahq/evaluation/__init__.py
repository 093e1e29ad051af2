"""How good a circuit is: what it recovers, against chance, and against one that is known."""

from pahq.evaluation.faithfulness import Faithfulness, TaskReport, faithfulness
from pahq.evaluation.plots import plot_curve, plot_roc
from pahq.evaluation.roc import Roc, auc_roc
from pahq.evaluation.runs import Score
from pahq.evaluation.sizes import SIZES, SizeCurve, cpr_cmd

__all__ = [
    "SIZES",
    "Faithfulness",
    "Roc",
    "Score",
    "SizeCurve",
    "TaskReport",
    "auc_roc",
    "cpr_cmd",
    "faithfulness",
    "plot_curve",
    "plot_roc",
]
