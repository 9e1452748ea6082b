"""What a run leaves for people: tables, figures, and one self-contained HTML page.

`write_report` writes the page (and PNGs), `final_table` and `comparison_table` make rich tables for the terminal,
`write_summary_csv` writes a sweep's ``summary.csv``, `load_run` and `load_all` read run folders back.
matplotlib is imported only when a figure is drawn.
"""

from fl.report.html import write_report
from fl.report.load import Collection, Run, load_all, load_run
from fl.report.tables import comparison_table, final_table, write_summary_csv

__all__ = [
    "Collection",
    "Run",
    "comparison_table",
    "final_table",
    "load_all",
    "load_run",
    "write_report",
    "write_summary_csv",
]
