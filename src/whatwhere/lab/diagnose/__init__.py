"""whatwhere diagnose."""
