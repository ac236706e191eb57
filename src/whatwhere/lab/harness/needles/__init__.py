"""Needles in books: facts hidden at known depths of a long text, and questions about them.

Kinds as in RULER (arXiv 2404.06654), with wording of our own: one fact, one among several keys,
several values of one key, several keys, chains of variables, and the words that a list has most
often.
"""
