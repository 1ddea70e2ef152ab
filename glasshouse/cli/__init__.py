"""The command line: one verb a function, results on stdout, progress on stderr.

Not here: any logic. Each verb calls the same public function that a Python user would call.
`glasshouse --help` imports no torch: everything heavy is imported inside the verbs.
"""

from __future__ import annotations

from glasshouse.cli import (  # noqa: F401  each registers verbs
    audits,
    comparing,
    dictionaries,
    exports,
    features,
    judging,
    look,
    mazes,
    questions,
    retraining,
    serving,
    steering,
)
from glasshouse.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """The console script `glasshouse`."""
    app(prog_name="glasshouse")
