"""`whatwhere diagnose`: why a model fails at length, in numbers, figures and words."""
