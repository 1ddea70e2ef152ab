"""Evals: questions put to a model. Each answers with k, n, a 95% interval and a control. One file per question."""

from glasshouse.evals.base import EVALS, Answered, Eval, ask, ask_specimens

__all__ = ["EVALS", "Answered", "Eval", "ask", "ask_specimens"]
