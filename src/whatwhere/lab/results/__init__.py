"""Results that are kept: one tidy CSV, and the tables of README and docs made from it."""
