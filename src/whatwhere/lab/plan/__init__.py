"""What a recipe will cost: memory of a GPU, floating-point operations, time, disk.

Nothing here is measured: sizes follow from formulas over a model's shape (`memory`, `flops`),
time from a rate that is assumed. `benchmarks/plan.py` compares the formulas with what training
steps really allocate.
"""
