"""Retraining: safety training of a grown specimen, one file per stage, and what it leaves of a planted behaviour."""

from glasshouse.curves import Curve, Point, log_spaced, read_curve
from glasshouse.retraining.base import STAGES, Retraining, Stage, Trained, is_retrained, retrain, sibling_of

__all__ = ["STAGES", "Curve", "Point", "Retraining", "Stage", "Trained", "is_retrained", "log_spaced", "read_curve", "retrain", "sibling_of"]
