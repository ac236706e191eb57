"""The report of a comparison: one page, its figures and tables, from whatever its folder holds."""
