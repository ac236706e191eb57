"""Measuring attention, decoding and training steps side by side.

Works without tyro, rich and pydantic: ``python -m whatwhere.lab.bench`` takes what
``whatwhere bench`` takes.
"""
