"""A run's record as JSON, as one self-contained HTML page, as rows for a terminal, as a picture."""

from robust_prune.report.card import is_pruned, model_info, to_card
from robust_prune.report.checking import check_record
from robust_prune.report.comparison import (
    accuracy_by_model,
    comparison_line,
    cost_by_model,
    to_comparison_html,
)
from robust_prune.report.page import SCHEMA, to_html, to_json
from robust_prune.report.plots import save_mrs_plot
from robust_prune.report.rows import (
    ATTACK_NAMES,
    accuracy_rows,
    accuracy_table,
    cost_rows,
    drop_table,
    percent,
)
from robust_prune.report.sentences import check_line, drop_line, flags, grade_line, headline

__all__ = [
    "ATTACK_NAMES",
    "SCHEMA",
    "accuracy_by_model",
    "comparison_line",
    "cost_by_model",
    "to_comparison_html",
    "accuracy_rows",
    "accuracy_table",
    "check_line",
    "check_record",
    "cost_rows",
    "drop_line",
    "drop_table",
    "flags",
    "grade_line",
    "headline",
    "is_pruned",
    "model_info",
    "percent",
    "save_mrs_plot",
    "to_card",
    "to_html",
    "to_json",
]
