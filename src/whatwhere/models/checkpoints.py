"""Writing and opening checkpoints: the card, the shim, and parameters of encodings that are lost.

What transformers does about a weight that is missing, left over or of another shape is a line in
its log. For a position encoding that is a model which reads well and is wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData

SHIM = "modeling_whatwhere.py"
"""The file by which ``trust_remote_code=True`` opens a checkpoint without importing whatwhere."""

# Modules that hold encodings, in converted models and in ours.
_ENCODINGS = re.compile(r"(^|\.)(position_encoding|encoding|absolute)\.\w+$")


@dataclass(frozen=True)
class Shim:
    """A file that names the classes of a checkpoint.

    Attributes:
        config: Name of the config's class within it.
        decoder: Of the model without a head.
        head: Of the causal language model.
        imports: The lines that get them.
    """

    config: str
    decoder: str
    head: str
    imports: str

    @property
    def auto_map(self) -> dict[str, str]:
        """What transformers reads from a config."""
        module = SHIM.removesuffix(".py")
        return {
            "AutoConfig": f"{module}.{self.config}",
            "AutoModel": f"{module}.{self.decoder}",
            "AutoModelForCausalLM": f"{module}.{self.head}",
        }

    @property
    def source(self) -> str:
        """The file."""
        about = (
            "Opens this checkpoint with trust_remote_code=True: pip install 'whatwhere[models]'."
        )
        return f'"""{about}"""\n\n{self.imports}'


class Checkpoints:
    """``from_pretrained`` and ``save_pretrained`` of our models; comes before transformers'."""

    def shim(self) -> Shim:
        """What opens a checkpoint of this model for programs that do not import us."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, except that an encoding that does not fit its weights is an error.

        Raises:
            ValueError: If a weight's shape is not the one the config asks for, unless
                ``ignore_mismatched_sizes=True``; if the checkpoint has parameters of an encoding
                that its config has not; if it lacks some, unless another ``config`` was given.
        """
        tolerant = kwargs.pop("ignore_mismatched_sizes", False)
        wants_info = kwargs.pop("output_loading_info", False)
        place = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        own_config = _is_its_own(kwargs.get("config"), place)
        model, info = cast(Any, super()).from_pretrained(
            *args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        wrong = sorted(info["mismatched_keys"])
        if wrong and not tolerant:
            name, got, expected = wrong[0]
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise ValueError(
                f"{name} has shape {tuple(got)} in the checkpoint: expected {tuple(expected)}, "
                f"which is what its config asks for{more}"
            )
        encoding = model.config.layer_encodings[0][0]
        left = sorted(key for key in info["unexpected_keys"] if _ENCODINGS.search(key))
        if left:
            raise ValueError(
                f"the checkpoint has {left[0]}, of another position encoding than {encoding!r}, "
                "which its config names: its weights were trained with that one"
            )
        missing = sorted(key for key in info["missing_keys"] if _ENCODINGS.search(key))
        if missing and own_config:
            raise ValueError(
                f"the checkpoint has no {missing[0]}, which position encoding {encoding!r} of its "
                "config needs: its weights were trained with another one"
            )
        return (model, info) if wants_info else model

    def save_pretrained(
        self, save_directory: Any, *args: Any, shim: bool | None = None, **kwargs: Any
    ) -> None:
        """As in transformers, with a model card unless there is one already.

        Args:
            save_directory: The folder.
            *args: As in transformers.
            shim: Whether to write `SHIM`, so that programs which never import whatwhere can open
                the checkpoint with ``trust_remote_code=True`` (where it is installed); ``None``
                is as the model itself was opened.
            **kwargs: As in transformers.
        """
        config = cast(Any, self).config
        shim = getattr(config, "auto_map", None) is not None if shim is None else shim
        if shim:
            config.auto_map = self.shim().auto_map
        elif hasattr(config, "auto_map"):
            del config.auto_map
        cast(Any, super()).save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        if not kwargs.get("is_main_process", args[0] if args else True) or not folder.is_dir():
            return
        self._write_shim(folder)
        if not (folder / "README.md").exists():
            make_card(self).save(folder / "README.md")

    def _write_shim(self, folder: Any) -> None:
        if getattr(cast(Any, self).config, "auto_map", None) is not None:
            (Path(folder) / SHIM).write_text(self.shim().source, encoding="utf-8")

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        # With push_to_hub=True transformers uploads before save_pretrained gets to the shim.
        self._write_shim(working_dir)
        return cast(Any, super())._upload_modified_files(working_dir, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: transformers would copy a file of this package into every checkpoint."""


def make_card(model: Any) -> ModelCard:
    """A model card: encoding, base and training length, and how to open the checkpoint."""
    config = model.config
    entries = config.layer_encodings
    names = list(dict.fromkeys(name for name, _ in entries))
    base = getattr(config, "base_model", None)
    hub_id = base if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=hub_id,
        tags=["whatwhere", "position-encoding", *names],
    )
    length = getattr(config, "train_length", None) or config.max_position_embeddings
    told = [("position encoding", ", ".join(names))]
    if all(entry == entries[0] for entry in entries):
        told += [(f"its `{key}`", f"`{value}`") for key, value in sorted(entries[0][1].items())]
    else:
        told += [(f"layer {i}", f"`{name}` {given}") for i, (name, given) in enumerate(entries)]
    kind = getattr(config, "base_model_type", None)
    told += [("converted from", f"{base or 'a model'} (`{kind}`)")] if kind else []
    told += [("training length of the encoding", f"{length} tokens")]
    told += [("`max_position_embeddings`", f"{config.max_position_embeddings} tokens")]
    rows = "\n".join(f"| {what} | {value} |" for what, value in told)
    text = (
        f"# {type(model).__name__}\n\n| | |\n|---|---|\n{rows}\n\n"
        "```python\n"
        "import whatwhere.models  # pip install 'whatwhere[models]'\n"
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this folder or repository")\n'
        "```\n\n"
        "Without that import transformers does not know this model type, and says so.\n"
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _is_its_own(config: Any, place: Any) -> bool:
    """Whether a config is the one that lies with the weights."""
    return config is None or str(getattr(config, "_name_or_path", "")) == str(place)
