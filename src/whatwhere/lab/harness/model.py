"""The model as the harness asks it: log-likelihoods and greedy text, truncation counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

import whatwhere.models  # noqa: F401 - registers our types with the Auto classes
from whatwhere.analysis.layers import table_length
from whatwhere.lab.evaluate import best_device
from whatwhere.lab.harness.settings import Settings
from whatwhere.lab.harness.subject import Subject, load_tokenizer, loading


class TooLongError(ValueError):
    """An answer alone is longer than what the model reads."""

    def __init__(self, tokens: int, length: int) -> None:
        super().__init__(
            f"an answer of {tokens} tokens does not fit the {length} that the model reads; give a "
            "larger --max-length, which an encoding without a table of positions allows"
        )


class CountingLM(HFLM):
    """The harness's own model that counts prompts that it had to cut.

    The harness cuts prompts longer than the model's length from the left, which leaves a number
    that looks like any other.

    Attributes:
        cut: Requests cut since the count was last taken.
    """

    cut = 0

    def take_cut(self) -> int:
        """The count, which then starts anew."""
        found, self.cut = self.cut, 0
        return found

    def get_model_info(self) -> dict[str, Any]:
        """Size, dtype and commit, without asking the hub for the name of a local folder."""
        if not Path(self.pretrained).is_dir():
            return dict(super().get_model_info())
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "model_revision": self.revision,
            "model_sha": "",
        }

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        longest_rest = max((len(rest) for _, _, rest in requests), default=0)
        if longest_rest > self.max_length:
            raise TooLongError(longest_rest, self.max_length)
        room = self.max_length + 1
        self.cut += sum(len(context) + len(rest) > room for _, context, rest in requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Continue prompts greedily, as the harness does."""
        for prompt, options in (request.args for request in requests):
            answer = int(options.get("max_gen_toks", self.max_gen_toks))
            if answer >= self.max_length:
                raise TooLongError(answer, self.max_length)
            tokens = self.tok_batch_encode([prompt])[0].shape[1]
            self.cut += tokens > self.max_length - answer
        return super().generate_until(requests, disable_tqdm=disable_tqdm)


def load(subject: Subject, settings: Settings) -> CountingLM:
    """Load model and tokenizer.

    Raises:
        ValueError: If they cannot be loaded, do not fit one another, or the length asked for is
            beyond the model's table of positions.
    """
    device = _device(settings.device)
    tokenizer = load_tokenizer(subject, settings)
    with loading(subject.given):
        lm = CountingLM(
            pretrained=subject.path,
            backend="causal",
            tokenizer=tokenizer,
            revision=settings.revision,
            dtype=settings.dtype,
            device=device,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            trust_remote_code=settings.trust_remote_code,
        )
    limit = table_length(lm.model)
    if limit is not None and lm.max_length > limit:
        raise ValueError(
            f"max-length: {lm.max_length} is beyond the model's table of positions, which ends at "
            f"{limit}"
        )
    rows = lm.model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"model: its tokenizer has {tokenizer.vocab_size} tokens, its embedding only {rows} "
            "rows: is this its tokenizer?"
        )
    return lm


def _device(name: str | None) -> str:
    if name is None:
        return best_device().type
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: {name!r} is none, expected one as in cpu or cuda:0") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device: {name!r} is not here; GPUs here: {count}")
    return name
