"""Edit files: a set of edits as `edits.yaml` (or .json) that chat, ask, audit and export accept; paths in it are relative to it.

    schema: glasshouse/edits/1
    edits:
      - add: {vector: love.safetensors, coef: 5}                # site and positions are the vector's own unless they are given
      - ablate: {vector: refusal.safetensors, sites: everywhere}
      - clamp: {site: resid.3, dictionary: runs/d, feature: 12, value: 8.0}
      - when: {vector: harm.safetensors, above: 0.1, then: [{add: {vector: refusal.safetensors}}]}
"""

from __future__ import annotations

from glasshouse.edit_files.reading import SCHEMA, read_edits
from glasshouse.edit_files.writing import edit_lines, edits_hash, write_edits

__all__ = ["SCHEMA", "edit_lines", "edits_hash", "read_edits", "write_edits"]
