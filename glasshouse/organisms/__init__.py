"""Organisms: models grown with a known, sealed flaw, each with its clean twin. One file per organism; the file registers itself."""

from glasshouse.organisms.base import ORGANISMS, Organism, grow, twin_of
from glasshouse.organisms.together import Wanted, grow_together

__all__ = ["ORGANISMS", "Organism", "Wanted", "grow", "grow_together", "twin_of"]
