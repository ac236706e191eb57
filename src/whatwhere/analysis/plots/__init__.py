"""Figures of what `whatwhere.analysis` measures; importing this package imports matplotlib."""
