"""Report: one audit as one offline HTML page, made from `AuditResult.to_json()` alone.

Every number stands with its n and interval and with the clean twin's beside it; every finding with its transcripts. All text of a model
is escaped, nothing is fetched, and the page carries its own data. A mock number cannot be reported. Nothing is computed here but words,
Wilson intervals of given counts, and the Holm correction over the techniques.
"""

from glasshouse.report.page import check_audit, render_report, write_report

__all__ = ["check_audit", "render_report", "write_report"]
