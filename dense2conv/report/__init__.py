"""The page, the figures and the terminal table that show what a run found."""

from dense2conv.report.charts import centre_map, curves, histogram
from dense2conv.report.images import kernel_bank, montage
from dense2conv.report.page import write_comparison, write_report
from dense2conv.report.verdict import Verdict, judge, table

__all__ = [
    "Verdict",
    "centre_map",
    "curves",
    "histogram",
    "judge",
    "kernel_bank",
    "montage",
    "table",
    "write_comparison",
    "write_report",
]
