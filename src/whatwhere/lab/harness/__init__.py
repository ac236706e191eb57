"""Evaluation with the LM Evaluation Harness, on data of the hub or of local files.

Importing this package imports neither lm_eval nor datasets: the modules that need them are
imported by the commands that use them.
"""
