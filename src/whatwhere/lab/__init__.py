"""Experiments: data, training, evaluation and reports (needs the extra `lab`)."""
