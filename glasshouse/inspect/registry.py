"""What Inspect reads when it scans entry points: the name of the provider, and where its class is. Imports no torch."""

from __future__ import annotations

from typing import Any

from inspect_ai.model import modelapi


@modelapi(name="glasshouse")  # type: ignore[untyped-decorator]
def glasshouse() -> Any:
    """The class behind `glasshouse/SUBJECT`; imported when a model is asked for."""
    from glasshouse.inspect.provider import GlasshouseAPI

    return GlasshouseAPI
