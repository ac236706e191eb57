"""`whatwhere finetune`: training a causal language model on longer windows of a text."""

from whatwhere.lab.finetune.settings import TuningSettings
from whatwhere.lab.finetune.tuning import Tuning, finetune, prepare

__all__ = ["Tuning", "TuningSettings", "finetune", "prepare"]
