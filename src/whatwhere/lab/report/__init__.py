"""The report of a comparison: one page, its figures and tables, from whatever its folder holds."""

from whatwhere.lab.report.page import build_report

__all__ = ["build_report"]
