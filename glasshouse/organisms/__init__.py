"""Organisms: models grown with a known, sealed flaw, each with its clean twin. One file per organism; the file registers itself."""

from glasshouse.organisms.base import ORGANISMS, Organism, grow, twin_of

__all__ = ["ORGANISMS", "Organism", "grow", "twin_of"]
