"""What people look at: one self-contained HTML page a run, made from evaluation folders.

`evaluation` reads a folder, `figures` and `overlays` draw it, `text` says it in words, `pages`
puts the page together.
"""

from moshi_ttt.report.pages import compare_report, write_report

__all__ = ["compare_report", "write_report"]
