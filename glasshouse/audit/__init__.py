"""Audit: a blind game. Techniques see a sealed case through metered accesses, in a process of their own; scores come after the seal is opened.

`glasshouse.audit(subject)` runs it (this package can be called); `TECHNIQUES` holds the techniques, one file each in `techniques/`.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glasshouse.audit.cases import TECHNIQUES, Budget, Case, Cost, Finding, Lead, Measure, Outcome, Technique, technique
    from glasshouse.audit.game import AuditResult, audit

_HOMES = {
    **dict.fromkeys(["TECHNIQUES", "Budget", "Case", "Cost", "Finding", "Lead", "Measure", "Outcome", "Technique", "technique"], "cases"),
    **dict.fromkeys(["AuditResult", "audit"], "game"),
}
__all__ = ["TECHNIQUES", "AuditResult", "Budget", "Case", "Cost", "Finding", "Lead", "Measure", "Outcome", "Technique", "audit", "technique"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"glasshouse.audit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'glasshouse.audit' has no attribute {name!r}")


class _CallablePackage(types.ModuleType):
    """Lets `glasshouse.audit(...)` work although `glasshouse.audit` is also a package that holds files."""

    def __call__(self, *args: Any, **options: Any) -> AuditResult:
        from glasshouse.audit.game import audit

        return audit(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage
