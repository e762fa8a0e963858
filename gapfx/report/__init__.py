"""The report of a run: one HTML file, and a few lines for the terminal."""

from __future__ import annotations

from gapfx.report.page import write_report
from gapfx.report.summary import format_summary

__all__ = ["format_summary", "write_report"]
