"""Decoders with any position encoding, native to transformers.

Importing this package registers them with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`
under the model type ``"whatwhere"``.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from whatwhere.models.cache import LayerCache
from whatwhere.models.configuration import WhatWhereConfig
from whatwhere.models.conversion import (
    Convertibility,
    NotConvertibleError,
    convert,
    convertible,
    from_transformers,
    to_transformers,
)
from whatwhere.models.modeling import WhatWhereForCausalLM, WhatWhereModel
from whatwhere.models.presets import PRESETS, preset

AutoConfig.register(WhatWhereConfig.model_type, WhatWhereConfig, exist_ok=True)
AutoModel.register(WhatWhereConfig, WhatWhereModel, exist_ok=True)
AutoModelForCausalLM.register(WhatWhereConfig, WhatWhereForCausalLM, exist_ok=True)

__all__ = [
    "PRESETS",
    "Convertibility",
    "LayerCache",
    "NotConvertibleError",
    "WhatWhereConfig",
    "WhatWhereForCausalLM",
    "WhatWhereModel",
    "convert",
    "convertible",
    "from_transformers",
    "preset",
    "to_transformers",
]
