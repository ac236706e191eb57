"""The decoder: `WhatWhereModel` and, with a language-modelling head, `WhatWhereForCausalLM`.

Attention is `whatwhere.attention` in every layer; none of transformers' attention interfaces is
used.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from whatwhere.encodings import Encoding
from whatwhere.models.blocks import ResidualLinear, WhatWhereBlock
from whatwhere.models.cache import LayerCache, report_layer
from whatwhere.models.checkpoints import Checkpoints, Shim
from whatwhere.models.configuration import WhatWhereConfig
from whatwhere.models.context_parallel import ContextShard
from whatwhere.models.layer_encodings import (
    make_absolute_encoding,
    own_randomness,
    swap_encodings,
)
from whatwhere.models.layout import lay_out, lay_out_shared


class WhatWherePreTrainedModel(Checkpoints, PreTrainedModel):
    """What both models share: initialisation and loading."""

    config_class = WhatWhereConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["WhatWhereBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for each module that still has uninitialised parameters, with
        # torch.nn.init guarded so that loaded ones are left alone: `reset_parameters` goes
        # through it.
        if isinstance(module, Encoding):
            encodings = [m for m in self.modules() if isinstance(m, Encoding)]
            with own_randomness(encodings.index(module)):
                module.reset_parameters()
        elif isinstance(module, ResidualLinear):
            depth = 2 * self.config.num_hidden_layers
            init.normal_(module.weight, std=self.config.initializer_range / math.sqrt(depth))
        else:
            super()._init_weights(module)

    def shim(self) -> Shim:
        """What opens a checkpoint of this model for programs that do not import us."""
        names = ("WhatWhereConfig", "WhatWhereModel", "WhatWhereForCausalLM")
        return Shim(*names, f"from whatwhere.models import {', '.join(names)}\n")


class WhatWhereModel(WhatWherePreTrainedModel):
    """The decoder without a head: tokens to hidden states.

    Args:
        config: Shape and position encodings.
    """

    def __init__(self, config: WhatWhereConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.absolute = make_absolute_encoding(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            WhatWhereBlock(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        context: ContextShard | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the new tokens.

        Args:
            input_ids: ``(B, T)`` token ids.
            attention_mask: ``(B, S)``, 1 for tokens and 0 for padding, left or right; S counts
                cached tokens.
            position_ids: ``(B, T)``, increasing; by default tokens are counted without padding.
                Where there is neither padding on the left nor a cache, positions that fall back
                start a new document (as `DataCollatorWithFlattening` of transformers makes
                them). Encoded caches keep keys at these positions; raw ones count from the mask.
            past_key_values: Cache of transformers. It is added to.
            inputs_embeds: ``(B, T, hidden_size)`` in place of ``input_ids``.
            use_cache: Whether to make a cache if none is given; by default not, so that
                training and evaluation pay for none. ``generate`` asks for it. A cache that is
                given is read and added to in any case.
            segment_ids: ``(B, T)`` integers, the document of each token of a packed batch.
                Documents do not see one another, and positions start anew in each.
            output_hidden_states: Whether to return the embeddings and every layer's output.
            context: Which positions of longer sequences these are, which several processes
                share; ``input_ids`` then is ``context.take(whole)``, and ``segment_ids`` is that
                of whole sequences. Masks, position ids and caches cannot be given with it.
            **kwargs: Ignored, except ``output_attentions``, which is refused.

        Raises:
            ValueError: If arguments do not fit one another.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        check_tokens(input_ids, inputs_embeds, self.config.hidden_size)
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions=True: fused kernels keep no weights; whatwhere.scores gives "
                "the scores of one layer"
            )
        hidden: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = self._cache(past_key_values, use_cache)
        given: dict[str, Any] = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "segment_ids": segment_ids,
            "past_key_values": past_key_values,
        }
        size = (hidden.shape[0], hidden.shape[1], hidden.device)
        layout = (
            lay_out(*size, **given) if context is None else lay_out_shared(context, *size, **given)
        )
        added = None if self.absolute is None else self.absolute.embed(layout.positions)
        if added is not None:
            hidden = hidden + added.to(hidden.dtype)
        hidden = self.dropout(hidden)
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, layout, past_key_values=past_key_values)
            states.append(hidden)
        hidden = self.norm(hidden)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*states[:-1], hidden) if output_hidden_states else None,
        )

    def set_position_encoding(self, name: str, **options: Any) -> None:
        """Give every layer another position encoding, in place, and the config with it.

        For evaluating trained weights under other scores, e.g. RoPE's as YaRN
        (``set_position_encoding("yarn", factor=4.0)``). The new encoding takes over the
        parameters of the old one, and must have the same. Options not given keep their present
        value where the new encoding has one of that name (``base``, say), else its default.

        Args:
            name: A name in `whatwhere.ENCODINGS`.
            **options: Its options.

        Raises:
            ValueError: If the name or an option is unknown, or parameters would be lost or be
                missing. The model is then left as it was.
        """
        swap_encodings(self, name, options)

    @property
    def blocks(self) -> list[WhatWhereBlock]:
        """The layers, typed."""
        return [cast(WhatWhereBlock, layer) for layer in self.layers]

    def cache_report(self, device: torch.device | str | None = None) -> list[LayerCache]:
        """What each layer keeps in a cache: form of its keys, numbers per token, and why.

        Args:
            device: Where decoding takes place; by default where the model lies.
        """
        target = self.device if device is None else torch.device(device)
        config, names = self.config, self.config.layer_encodings
        sizes = (config.num_key_value_heads, config.head_dim)
        return [
            report_layer(
                config.cache_form,
                index,
                names[index][0],
                layer.self_attn.encoding(self.device),
                target,
                *sizes,
            )
            for index, layer in enumerate(self.blocks)
        ]

    def _cache(self, given: Any, use_cache: bool | None) -> Cache | None:
        if given is not None and not isinstance(given, Cache):
            raise ValueError(
                f"past_key_values is a {type(given).__name__}: expected a transformers Cache"
            )
        if self.gradient_checkpointing and self.training:
            past = 0 if given is None else given.get_seq_length()
            if not (isinstance(past, int) and past == 0):
                raise ValueError(
                    "past_key_values holds tokens, which gradient checkpointing would add anew in "
                    "the backward pass: call eval() or gradient_checkpointing_disable()"
                )
            return None
        return DynamicCache(config=self.config) if given is None and use_cache else given


def check_tokens(ids: Any, embeds: Any, width: int) -> None:
    """Check what a decoder is given: token ids, or embeddings of this width.

    Raises:
        ValueError: If it is no tensor, or of another shape or dtype.
    """
    given = ids if embeds is None else embeds
    name = "input_ids" if embeds is None else "inputs_embeds"
    expected = "int64 or int32 of shape (B, T)" if embeds is None else f"shape (B, T, {width})"
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} is a {type(given).__name__}: expected a tensor, {expected}")
    fits = (
        given.ndim == 2 and given.dtype in (torch.int64, torch.int32)
        if embeds is None
        else given.ndim == 3 and given.shape[2] == width
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(given.shape)} and dtype {given.dtype}: expected {expected}"
        )


class WhatWhereForCausalLM(WhatWherePreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head.

    Args:
        config: Shape and position encodings.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: WhatWhereConfig) -> None:
        super().__init__(config)
        self.model = WhatWhereModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        segment_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        context: ContextShard | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``(B, T, vocab_size)`` and, with labels, the mean loss in nats per token.

        Args:
            input_ids: See `WhatWhereModel.forward`, as for all not named here.
            attention_mask: See there.
            position_ids: See there.
            past_key_values: See there.
            inputs_embeds: See there.
            labels: ``(B, T)``, aligned with ``input_ids`` (shifted inside), -100 where ignored.
            use_cache: See there.
            logits_to_keep: Compute logits of the last so many tokens only (0: all), or of the
                tokens at these indices. With labels, all are needed.
            segment_ids: See there.
            output_hidden_states: See there.
            context: See there. Labels must then be shifted before they are divided: give them
                as ``labels`` and as ``shift_labels``.
            **kwargs: For the loss of transformers (``num_items_in_batch``, ``shift_labels``).

        Raises:
            ValueError: If arguments do not fit one another.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            output_hidden_states=output_hidden_states,
            context=context,
            return_dict=True,
            output_attentions=kwargs.pop("output_attentions", None),
        )
        keep = logits_to_keep
        rows = slice(-keep, None) if isinstance(keep, int) else keep
        logits = self.lm_head(out.last_hidden_state[:, rows])
        loss = None
        if labels is not None and context is not None and "shift_labels" not in kwargs:
            raise ValueError("labels together with context: expected shift_labels too")
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
        )

    def set_position_encoding(self, name: str, **options: Any) -> None:
        """See `WhatWhereModel.set_position_encoding`."""
        self.model.set_position_encoding(name, **options)

    def cache_report(self, device: torch.device | str | None = None) -> list[LayerCache]:
        """See `WhatWhereModel.cache_report`."""
        return self.model.cache_report(device)

    @staticmethod
    def create_masks_for_generate(
        config: WhatWhereConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache,
        **kwargs: Any,
    ) -> Tensor | None:
        """The 2-D mask for a static cache, as long as the cache: `generate` calls this.

        transformers would make a 4-D one. A length that does not grow spares a compiled step
        recompilation.
        """
        if attention_mask is None:
            return None
        total, offset = past_key_values.get_mask_sizes(inputs_embeds.shape[1], 0)
        missing = max(0, offset + total - attention_mask.shape[1])
        return F.pad(attention_mask, (0, missing))

    def _get_static_cache_init_shape(self) -> Any:
        # Allocating in advance assumes keys as wide as values, which polar features are not;
        # None leaves it to the first update.
        wide = any(
            entry.numbers_per_token != 2 * self.config.num_key_value_heads * self.config.head_dim
            for entry in self.cache_report()
        )
        return None if wide else super()._get_static_cache_init_shape()
