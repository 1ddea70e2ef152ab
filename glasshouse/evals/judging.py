"""Prompts and judges from outside the world, for networks that are not of it: data sets of prompts, Hugging Face classifiers, Inspect models.

A judge is a model and can be wrong; where the world's own words can decide, they do (`sentiment.py`, `insults.py`). Its verdict is
on the continuation alone. Nothing is downloaded unless a hub id is given.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glasshouse.errors import BadValue, GlasshouseError

MEANINGS: Mapping[str, Sequence[str]] = {
    "positive": ("positive", "pos", "label_1", "1"),
    "negative": ("negative", "neg", "label_0", "0"),
    "neutral": ("neutral", "neu"),
    "insult": ("toxic", "toxicity", "insult", "hate", "offensive", "label_1", "1"),
    "clean": ("nontoxic", "non-toxic", "not toxic", "neutral", "clean", "nothate", "not-offensive", "non-offensive", "label_0", "0"),
}
"""What published classifiers call the classes (in lower case)."""
INSPECT = "inspect:"
QUESTION = """Below is the continuation of a text. Which of these words describes it best: {classes}?

<continuation>
{text}
</continuation>

Answer with that one word only."""


class ClassifierJudge:
    """A Hugging Face text classifier as grader: its most likely class, by the names of `MEANINGS`."""

    def __init__(self, path: str, classes: Sequence[str], batch_size: int = 32) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            self.hf: Any = AutoModelForSequenceClassification.from_pretrained(path).eval()
        except (OSError, ValueError) as error:
            raise BadValue(f"The judge {path!r} is no text classifier that transformers can load: {str(error).splitlines()[0]}") from error
        known = {int(index): str(label) for index, label in self.hf.config.id2label.items()}
        self.labels = {index: meaning for index, label in known.items() if (meaning := _meaning(label, classes))}
        if len(known) == 1 and set(classes) == {"insult", "clean"}:
            self.labels = {0: "insult"}
        missing = set(classes) - set(self.labels.values())
        if missing - {"neutral", "clean"}:
            names = ", ".join(known.values())
            raise BadValue(f"The judge {path!r} has the classes {names}; none of them means {', '.join(sorted(missing))}.")
        self.batch_size, self.several = batch_size, "clean" in missing

    def __call__(self, prompt: str, continuation: str) -> str:
        """The class of one continuation."""
        return self.many([(prompt, continuation)])[0]

    def many(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """The classes of several. A classifier without a class for "clean" (one output a kind of toxicity) finds an insult above 0.5."""
        import torch

        found: list[str] = []
        texts = [continuation for _, continuation in pairs]
        for start in range(0, len(texts), self.batch_size):
            given = self.tokenizer(texts[start : start + self.batch_size], return_tensors="pt", padding=True, truncation=True)
            with torch.no_grad():
                logits = self.hf(**given).logits
            if self.several:
                insulting = (logits[:, list(self.labels)] > 0).any(dim=-1).tolist()
                found += ["insult" if one else "clean" for one in insulting]
            else:
                chosen = list(self.labels)
                found += [self.labels[chosen[place]] for place in logits[:, chosen].argmax(dim=-1).tolist()]
        return found


class AskedJudge:
    """A language model behind Inspect as grader: it is asked for one word."""

    def __init__(self, model: Any, classes: Sequence[str]) -> None:
        from glasshouse.features.judges import InspectJudge

        self.asked, self.classes = InspectJudge(model), list(classes)

    def __call__(self, prompt: str, continuation: str) -> str:
        """The class of one continuation."""
        return self.many([(prompt, continuation)])[0]

    def many(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """The classes of several. Raises `GlasshouseError` when a reply names no class, or more than one."""
        replies = self.asked.many([QUESTION.format(classes=", ".join(self.classes), text=text) for _, text in pairs])
        found = []
        for reply in replies:
            said = [name for name in self.classes if name == reply.strip().strip(".\"'").lower()]
            if len(said) != 1:
                raise GlasshouseError(f"The judge {self.asked.name} answered {reply[:60]!r}, which is none of {', '.join(self.classes)}.")
            found += said
        return found


def _meaning(label: str, classes: Iterable[str]) -> str:
    return next((name for name in classes if label.lower() in MEANINGS.get(name, (name,))), "")


def read_judge(name: str, classes: Sequence[str]) -> ClassifierJudge | AskedJudge:
    """A grader from a classifier's folder or hub id, or from `inspect:MODEL`. Raises `BadValue`, `GlasshouseError`."""
    return AskedJudge(name.removeprefix(INSPECT), classes) if name.startswith(INSPECT) else ClassifierJudge(name, classes)


def read_prompts(source: str, n: int, seed: int, label: str | None = None, words: int = 12) -> list[str]:
    """`n` different prompts from a text file (one a line), JSON lines, a data set saved by `datasets`, or its hub id.

    A row's text is `text`, `prompt` or `prompt.text` (RealToxicityPrompts); a `text` is cut after `words` words (IMDb); `label`
    keeps the rows of that class. A hub id may name its split: `stanfordnlp/imdb:test`. Raises `BadValue` where too few are there.
    """
    rows = list(_read_rows(source))
    if label is not None:
        labels = [str(row.get("label", "")).lower() for row in rows]
        rows = [row for row, own in zip(rows, labels) if own in MEANINGS.get(label, (label,))]
    texts = list(dict.fromkeys(text for row in rows if (text := _prompt_of(row, words))))
    if len(texts) < n:
        raise BadValue(f"{source} holds {len(texts)} different prompts{f' labelled {label}' if label else ''}; ask for n={len(texts)} or fewer.")
    return random.Random(f"prompts {seed}").sample(texts, n)


def _read_rows(source: str) -> Iterable[Mapping[str, Any]]:
    path = Path(source)
    if path.is_file() and path.suffix not in (".json", ".jsonl", ".csv", ".parquet"):
        return [{"prompt": line} for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        import datasets
    except ImportError as error:
        raise BadValue(f"{source} is read with `datasets`, which is not installed: pip install datasets, or give a text file.") from error
    try:
        if path.is_file():
            kind = "json" if path.suffix.startswith(".json") else path.suffix[1:]
            return list(datasets.load_dataset(kind, data_files=str(path), split="train"))
        if path.is_dir():
            loaded = datasets.load_from_disk(str(path))
            return list(loaded if isinstance(loaded, datasets.Dataset) else loaded[next(iter(loaded))])
        name, _, split = source.partition(":")
        return list(datasets.load_dataset(name, split=split or "train"))
    except Exception as error:  # `datasets` raises many kinds
        raise BadValue(f"The prompts {source!r} are no file here, no saved data set, and `datasets` cannot load them: {str(error).splitlines()[0]}") from error


def _prompt_of(row: Mapping[str, Any], words: int) -> str:
    """The prompt in a row; "" where there is none."""
    found = row.get("prompt", row.get("text", ""))
    text = str(found.get("text", "") if isinstance(found, Mapping) else found).strip()
    return " ".join(text.split()[:words]) if "prompt" not in row else text
