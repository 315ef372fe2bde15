"""report.html: one page without script or network about a run folder; and the optional trackers beside it."""

from cz_jax.report.page import REPORT, write_report
from cz_jax.report.sinks import Sinks, load_sinks

__all__ = ["REPORT", "Sinks", "load_sinks", "write_report"]
