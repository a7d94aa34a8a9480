"""What people look at: one self-contained HTML page a run, made from evaluation folders.

`evaluation.folder` reads them; `figures`, `recall` and `overlays` draw; `headline`, `text` and
`recall_words` say it in words; `pages` puts the page together.
"""

from moshi_ttt.report.figures import png
from moshi_ttt.report.headline import headline
from moshi_ttt.report.pages import compare_report, write_report
from moshi_ttt.report.recall import recall_figure

__all__ = ["compare_report", "headline", "png", "recall_figure", "write_report"]
