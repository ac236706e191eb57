"""Converting a checkpoint into a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from whatwhere.encodings import options
from whatwhere.lab import storage
from whatwhere.lab.pretrained import Source, quiet

STARTS = {
    "weights": "as they were",
    "order": "channels in the order of frequencies",
    "signs": "signs and order from their means on the text",
    "centres": "turned to their centres on the text",
    "scores": "recombined to fit RoPE's scores on the text",
    "distilled": "recombined and refined to attend as RoPE does on the text",
    "distilled-zero": "refined to attend as RoPE does on the text, delta 0",
}

# What starts look at: as many windows as docs/from_rope.md has measured, and none longer.
WINDOWS, DISTILLED, LONGEST = 8, 24, 512


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        name: Class of the model that was converted.
        encoding: Its position encoding now.
        start: What its queries and keys were made into.
        layers: Layers that have one.
        added: Parameters that came with it.
        cache_bytes: Bytes that a cache takes for each token, all layers together.
        cache: In which form it keeps keys, and why.
        tokenizer: Whether there was one to copy.
        folder: Where everything is.
    """

    name: str
    encoding: str
    start: str
    layers: int
    added: int
    cache_bytes: int
    cache: str
    tokenizer: bool
    folder: Path

    def lines(self) -> list[str]:
        """All of it, for people."""
        tokenizer = "copied" if self.tokenizer else "there is none, so none was copied"
        return [
            f"{self.name}: {self.encoding} in {self.layers} layers, "
            f"{self.added:,} parameters added",
            f"queries and keys: {STARTS[self.start]}",
            f"cache: {self.cache_bytes:,} bytes per token; {self.cache}",
            f"tokenizer: {tokenizer}",
            f"written: {self.folder}",
        ]


def check(source: Source) -> Any:
    """Whether a model can be converted, from its config alone: no weights are read.

    Returns:
        What `whatwhere.models.convertible` answers.

    Raises:
        ValueError: If there is no config that can be read.
    """
    from whatwhere.models import Convertibility, convertible

    run = source.folder is not None and (source.folder / "run.json").exists()
    config = None if run else source.load_config()
    if config is None or config.model_type == "whatwhere":
        return Convertibility(
            False,
            "`whatwhere train` and `compare` made it, which give a model its encoding from the "
            "start: train one with the encoding you want",
        )
    with quiet():  # of what is refused transformers would say more
        return convertible(config)


def convert_folder(
    source: Source,
    encoding: str,
    output: Path,
    *,
    train_length: int | None = None,
    given: dict[str, Any] | None = None,
    dtype: str = "auto",
    shim: bool = False,
    start: str = "auto",
    text: Sequence[str] = (),
) -> Report:
    """Convert a model and write it with its tokenizer into a new folder.

    Args:
        source: The model, in a folder or on the hub.
        encoding: A name in `whatwhere.ENCODINGS`.
        output: The folder; there may be an empty one.
        train_length: See `whatwhere.models.convert`.
        given: Options of the encoding.
        dtype: Of the weights, a name in `torch`; ``"auto"`` is that of the checkpoint.
        shim: Whether to add a file with which programs that do not import `whatwhere` can open
            the folder (with ``trust_remote_code=True``).
        start: See `whatwhere.models.convert`; ``"auto"`` is, for PoPE and with text, the best one
            that the model takes, else ``"weights"``.
        text: UTF-8 files, folders or patterns for starts that look at some text.

    Raises:
        ValueError: If the model cannot be read or converted, the encoding or an option is
            unknown, or `output` holds something. Nothing has been written then.
        RunError: If `output` cannot be written.
    """
    from whatwhere.models import NotConvertibleError, convert

    options(encoding)
    if train_length is not None and train_length < 1:
        raise ValueError(f"train_length={train_length}: expected at least 1")
    check_output(output)
    answer = check(source)
    if not answer:
        raise NotConvertibleError(f"{source.name} cannot be converted: {answer.reason}")
    model = source.load_model(dtype)
    tokenizer = source.load_tokenizer()
    name, before = type(model).__name__, _count(model)
    chosen = _choose_start(start, encoding, model, text)
    calibration = None
    if chosen not in ("weights", "order"):
        count = DISTILLED if chosen.startswith("distilled") else WINDOWS
        calibration = _windows(source, model, text, tokenizer is not None, train_length, count)
    convert(
        model,
        encoding,
        train_length=train_length,
        start=cast(Any, chosen),
        calibration=calibration,
        **(given or {}),
    )
    with storage.new_folder(output) as folder:
        model.save_pretrained(folder, **({"shim": True} if shim else {}))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    caches = model.cache_report()
    return Report(
        name=name,
        encoding=encoding,
        start=chosen,
        layers=sum(entry.encoding == encoding for entry in caches),
        added=_count(model) - before,
        cache_bytes=sum(entry.numbers_per_token for entry in caches) * model.dtype.itemsize,
        cache=f"{caches[0].form} keys, as {caches[0].reason}",
        tokenizer=tokenizer is not None,
        folder=output,
    )


def _choose_start(start: str, encoding: str, model: Any, text: Sequence[str]) -> str:
    if start != "auto":
        return start
    if encoding != "pope" or not text:
        return "weights"
    normed = any(name.endswith("q_norm") for name, _ in model.named_modules())
    return "signs" if normed else "scores"


def _windows(
    source: Source,
    model: Any,
    text: Sequence[str],
    tokenizer: bool,
    train_length: int | None,
    count: int,
) -> Tensor:
    """A few windows of text, spread evenly."""
    if not text:
        raise ValueError("text: this start looks at some text: name files with --text")
    from whatwhere.lab.data import read_tokens, spaced_windows

    vocabulary = model.config.vocab_size
    if not tokenizer and vocabulary != 256:
        raise ValueError(
            f"text: {source.name} has no tokenizer and its vocabulary of {vocabulary} is not one "
            "of bytes"
        )
    name = str(source.folder or source.name) if tokenizer else "bytes"
    tokens = read_tokens(text, name)
    length = min(train_length or model.config.max_position_embeddings, LONGEST)
    windows = spaced_windows(tokens, min(length, len(tokens)), count)
    if int(windows.max()) >= vocabulary:
        raise ValueError(
            f"text: token {int(windows.max())} is outside the model's vocabulary of {vocabulary}"
        )
    return windows


def check_output(output: Path) -> None:
    """Check that a folder can be written without loss.

    Raises:
        ValueError: If it is a file, or holds something.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file: expected a new folder")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"output: {output} holds files already: expected a new or empty folder")


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
