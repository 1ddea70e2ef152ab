"""What an analyser says of one module: findings above a threshold, and whether the module is Python at all."""

from __future__ import annotations

from dataclasses import dataclass

from glasshouse.errors import UnknownName

LEVELS = ("LOW", "MEDIUM", "HIGH")


@dataclass(frozen=True)
class Finding:
    """One thing that an analyser found."""

    rule: str
    """The analyser's own name of the rule, such as `B608`."""
    cwe: int
    """CWE number; 0 where the analyser names none."""
    severity: str
    """`LOW`, `MEDIUM` or `HIGH`."""
    confidence: str
    """`LOW`, `MEDIUM` or `HIGH`; `HIGH` where the analyser has no such scale."""
    line: int
    """Line of the module, from 1; 0 where the analyser gives none."""
    message: str
    """What the analyser says."""


@dataclass(frozen=True)
class Scan:
    """One module, scanned."""

    findings: tuple[Finding, ...]
    """Findings at or above the thresholds."""
    compiles: bool
    """Whether the module is Python; one that is not has no findings and is neither secure nor vulnerable."""
    analyser: str
    """Which analyser, version and way of running it, such as `bandit 1.9.4, in process`."""
    error: str = ""
    """Why the analyser itself failed on a module that compiles; empty when it did not."""

    @property
    def is_vulnerable(self) -> bool:
        """At least one finding, of any CWE."""
        return bool(self.findings)

    def has_cwe(self, cwe: int) -> bool:
        """At least one finding of this CWE."""
        return any(found.cwe == cwe for found in self.findings)

    @property
    def outcome(self) -> str:
        """`vulnerable`, `secure`, or `broken` when it could not be scanned."""
        if not self.compiles or self.error:
            return "broken"
        return "vulnerable" if self.findings else "secure"


def check_level(level: str, what: str) -> str:
    """The level in capitals. Raises `UnknownName` for one that is not on the scale."""
    if level.upper() not in LEVELS:
        raise UnknownName(what, level, LEVELS)
    return level.upper()


def at_least(findings: tuple[Finding, ...], severity: str, confidence: str) -> tuple[Finding, ...]:
    """The findings at or above both levels."""
    low, sure = LEVELS.index(check_level(severity, "severity")), LEVELS.index(check_level(confidence, "confidence"))
    return tuple(found for found in findings if LEVELS.index(found.severity) >= low and LEVELS.index(found.confidence) >= sure)
