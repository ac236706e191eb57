"""`whatwhere convert`: a model from a folder or the hub, with another position encoding."""

from whatwhere.lab.convert.folder import check, convert_folder

__all__ = ["check", "convert_folder"]
