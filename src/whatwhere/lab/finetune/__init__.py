"""`whatwhere finetune`: training a causal language model on longer windows of a text.

`tuning.prepare` checks, `tuning.finetune` does it; `settings.TuningSettings` says how.
"""
