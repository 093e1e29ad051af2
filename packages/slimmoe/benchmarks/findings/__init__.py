"""The paper's five findings (arXiv:2605.08738) on a small mixture of experts of real text."""
