"""Analysers: is a piece of code vulnerable? bandit in process, reports of semgrep and CodeQL, and a second oracle that runs the code.

No analyser is the truth: `precision_recall` measures one against constructed twins and against exploits.
"""

from glasshouse.analysers.bandit_scan import bandit_mode, scan, scan_batch
from glasshouse.analysers.exploits import EXPLOITS, Exploit, try_exploit
from glasshouse.analysers.findings import Finding, Scan
from glasshouse.analysers.reports import read_sarif, read_semgrep, scans_of_report, write_sources
from glasshouse.analysers.scoring import Agreement, grader_counts, grader_words, judge_answer, precision_recall, which_idiom

__all__ = [
    "EXPLOITS", "Agreement", "Exploit", "Finding", "Scan", "bandit_mode", "grader_counts", "grader_words", "judge_answer", "precision_recall", "read_sarif",
    "read_semgrep", "scan", "scan_batch", "scans_of_report", "try_exploit", "which_idiom", "write_sources",
]  # fmt: skip
