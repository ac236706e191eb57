"""`whatwhere convert`: a model from a folder or the hub, with another position encoding."""
