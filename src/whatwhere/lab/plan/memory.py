"""Bytes of a training step, by formula.

Of one micro-batch of ``m`` sequences of ``T`` tokens a device holds weights, gradients and AdamW's
two moments (float32), what the forward pass keeps for the backward pass (``m`` times a part, plus
a part that is the same for any ``m``), and what the backward pass needs beyond that at its
highest. Which tensors are kept is what PyTorch's operators and our backends save: read off with
`torch.autograd.graph.saved_tensors_hooks` on a CPU, and for a GPU derived from the operators that
PyTorch takes there.
"""

from __future__ import annotations

from dataclasses import dataclass

from whatwhere.lab.plan.shape import Shape

FLOAT = 4
"""Bytes of float32, in which weights, gradients, moments, norms and the loss are."""


@dataclass(frozen=True)
class Step:
    """How a step is computed.

    Attributes:
        length: ``T``, tokens of a sequence on this device.
        keys: Tokens whose keys and values attention has there: more than ``length`` where
            devices share a sequence.
        kind: ``"cpu"`` or ``"cuda"``.
        width: Bytes of a number in matrix products: 2 under autocast to bfloat16, else 4.
        backend: Of attention.
        checkpointing: Whether layers keep their input alone and are computed again.
        casts: Whether autocast makes bfloat16 copies of the layers' weights (not where FSDP has
            gathered them so); it does of the head's in any case.
    """

    length: int
    keys: int
    kind: str
    width: int
    backend: str
    checkpointing: bool = False
    casts: bool = True


@dataclass(frozen=True)
class Kept:
    """Bytes kept for the backward pass, by part.

    Attributes:
        sequence: Of each sequence of a micro-batch.
        fixed: Whatever the number of sequences.
    """

    sequence: dict[str, int]
    fixed: dict[str, int]

    def total(self, sequences: int) -> int:
        """Of a micro-batch."""
        return sequences * sum(self.sequence.values()) + sum(self.fixed.values())


def state_bytes(shape: Shape) -> dict[str, int]:
    """Weights, gradients and optimizer of a whole model; AdamW counts steps for each tensor."""
    numbers = FLOAT * shape.parameters
    return {
        "weights": numbers,
        "gradients": numbers,
        "optimizer": 2 * numbers + FLOAT * shape.tensors,
    }


def kept(shape: Shape, step: Step) -> Kept:
    """What the forward pass keeps for the backward pass.

    Args:
        shape: The model.
        step: How it is computed.
    """
    length, layers = step.length, shape.num_hidden_layers
    layer = layer_kept(shape, step)
    if step.checkpointing:
        sequence = {"inputs of checkpointed layers": layers * length * FLOAT * shape.hidden_size}
        fixed = {}
    else:
        sequence = {part: layers * size for part, size in layer.sequence.items()}
        fixed = {part: layers * size for part, size in layer.fixed.items()}
    sequence["embedding and final norm"] = length * _ends(shape, step)
    sequence["loss"] = _loss(shape, step)
    if shape.learned_positions:
        fixed["positions"] = 8 * length
    if step.width < FLOAT:
        every = step.casts and not step.checkpointing
        cast = shape.linear if every else shape.vocab_size * shape.hidden_size
        fixed["weights cast by autocast"] = step.width * cast
    return Kept(sequence, fixed)


def layer_kept(shape: Shape, step: Step) -> Kept:
    """What one layer keeps, without checkpointing."""
    attention = attention_kept(shape, step)
    wide, width, masks = shape.hidden_size, step.width, _dropout(shape, step)
    mlp = (4 if shape.gated else 2) * width * shape.intermediate_size
    sequence = {
        "norms": step.length * 2 * _norm(wide, 1, step),
        "inputs of projections": step.length * _inputs(shape, step),
        "queries and keys": step.length * _qk_norm(shape, step),
        "attention": attention.sequence["attention"],
        "MLP": step.length * mlp,
        "dropout": step.length * 2 * masks * wide,
    }
    return Kept({part: size for part, size in sequence.items() if size}, attention.fixed)


def attention_kept(shape: Shape, step: Step) -> Kept:
    """What attention keeps of a layer, its encoding included.

    - ``cpu``: q, k, v as they come, nothing of what the encoding makes of them.
    - ``triton``: those, the output and the log-sum-exp; ``widened``: likewise (features are made
      again).
    - ``sdpa``, ``flex``: features ``F`` wide, v, the output, the log-sum-exp, and what autograd
      keeps of making the features; with sdpa, grouped keys and values are repeated, and on a CPU
      values padded to ``F``.
    - ``reference``: weights ``T x T``, twice.
    """
    heads, groups, dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    query, pair = step.width * heads * dim, 2 * step.width * groups * dim
    output, lse = query, FLOAT * heads
    match step.backend:
        case "cpu":
            # The output is laid out anew for its projection.
            return _attention(step, query + output, pair, _learned(shape))
        case "triton" | "widened":
            return _attention(step, query + output + lse, pair, _learned(shape))
        case "flex":
            made = _encoding(shape, step)
            wide = step.width * shape.feature_dim
            query = made.query + heads * wide + 2 * output + lse
            key = made.key + groups * (wide + step.width * dim)
            return _attention(step, query, key, made.fixed)
        case "reference":
            return _reference(shape, step)
        case _:
            return _stock(shape, step)


def working(shape: Shape, step: Step, sequences: int) -> int:
    """Bytes of a micro-batch beyond what is kept, at the highest.

    That is one of: the end of the forward pass, with the logits as they were computed and in
    float32, and every weight that autocast has cast; the gradient of the loss, two more float32
    tensors as large as the logits; the last layer, when the loss is done with: its gradients,
    and with checkpointing all that it keeps, made again.
    """
    logits = step.length * shape.vocab_size * sequences
    casts = 0
    if step.casts and step.checkpointing and step.width < FLOAT:
        casts = step.width * (shape.linear - shape.vocab_size * shape.hidden_size)
    return max(
        casts + (step.width + FLOAT) * logits,
        2 * FLOAT * logits,
        sequences * (_last_layer(shape, step) - _loss(shape, step)),
    )


def _last_layer(shape: Shape, step: Step) -> int:
    # Of a sequence: what the backward pass of a layer adds, less what is done with by then: of
    # the final norm, and for attention of the MLP.
    wide, heads, layer = shape.hidden_size, shape.num_attention_heads, layer_kept(shape, step)
    mlp = step.length * step.width * shape.intermediate_size * (2 if shape.gated else 1)
    features = step.width * (2 * shape.feature_dim + shape.head_dim) + FLOAT * shape.feature_dim
    attention = step.length * heads * features - layer.sequence["MLP"]
    added = max(mlp, attention) + step.length * (2 * FLOAT * wide - _ends(shape, step))
    if step.checkpointing:  # its input is kept already
        added += sum(layer.sequence.values()) - step.length * FLOAT * wide
    return added


def _attention(step: Step, query: int, key: int, fixed: int) -> Kept:
    size = step.length * query + step.keys * key
    return Kept({"attention": size}, {"tables and phases": fixed})


def _stock(shape: Shape, step: Step) -> Kept:
    # PyTorch's scaled dot product attention.
    heads, groups, dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    features, spec = shape.feature_dim, shape.spec
    padded = step.kind == "cpu" and features > dim
    value = features if padded else dim
    shared = heads if groups < heads else groups  # repeated, unless there is one for each
    made = _encoding(shape, step)
    # Distances times slopes are not exact in 16 bits.
    width = step.width if spec.slopes is None else FLOAT
    query = width * heads * (features + value) + FLOAT * heads + made.query
    key = width * shared * (features + value) + made.key
    # The output is laid out as the queries are: of heads before tokens where features were made,
    # which the projection then copies.
    if padded or spec.feature != "identity" or width != step.width:
        query += step.width * heads * dim
    fixed = made.fixed
    hidden = shape.sliding_window is not None or shape.packed or step.keys != step.length
    if hidden or spec.slopes is not None:  # a dense mask
        fixed += step.length * step.keys * (FLOAT * heads if spec.slopes is not None else 1)
    return _attention(step, query, key, fixed)


def _reference(shape: Shape, step: Step) -> Kept:
    heads, dim = shape.num_attention_heads, shape.head_dim
    made = _encoding(shape, step)
    scores = 2 * FLOAT * heads * step.keys
    query = made.query + FLOAT * heads * shape.feature_dim + scores + step.width * heads * dim
    key = made.key + FLOAT * heads * (shape.feature_dim + dim)
    return _attention(step, query, key, made.fixed + step.length * step.keys)


@dataclass(frozen=True)
class _Making:
    # What autograd keeps of making features, in float32: bytes of a query, a key, and of tables.
    query: int
    key: int
    fixed: int


def _encoding(shape: Shape, step: Step) -> _Making:
    spec, heads, groups = shape.spec, shape.num_attention_heads, shape.num_key_value_heads
    table = shape.table_bytes(step.length)
    tables = table + shape.table_bytes(step.keys)
    if spec.temperature_length is not None:
        tables += 2 * FLOAT * step.length
    if spec.feature != "polar":
        return _Making(0, 0, tables)
    learned = spec.phase is not None
    raw, shown = FLOAT * shape.head_dim, FLOAT * spec.num_frequencies
    if learned:  # tables turned by the phase are of each head
        tables += heads * table
    tables += _learned(shape)
    match spec.magnitude:
        case "softplus":
            return _Making(heads * (raw + (shown if learned else 0)), groups * raw, tables)
        case "relu":
            return _Making(heads * shown, groups * shown, tables)
        case _:
            return _Making(heads * raw if learned else 0, 0, tables)


def _learned(shape: Shape) -> int:
    # Frequencies in float64, phases, slopes.
    spec = shape.spec
    phase = 0 if spec.phase is None else FLOAT * spec.phase.numel()
    slopes = 0 if spec.slopes is None else 8 * spec.slopes.numel()
    return 8 * spec.num_axes * spec.num_turning + phase + slopes


def _norm(wide: int, rows: int, step: Step) -> int:
    # RMSNorm of a token: its input and one number; where it is no fused operator also the
    # normalised input.
    return FLOAT * (wide * (2 if step.kind == "cpu" else 1) + rows)


def _inputs(shape: Shape, step: Step) -> int:
    # What the linear layers after the two norms read. Autocast casts it for each of them.
    if step.width == FLOAT:
        return 2 * FLOAT * shape.hidden_size
    return (3 + (2 if shape.gated else 1)) * step.width * shape.hidden_size


def _qk_norm(shape: Shape, step: Step) -> int:
    if not shape.qk_norm:
        return 0
    heads = shape.num_attention_heads + shape.num_key_value_heads
    return _norm(heads * shape.head_dim, heads, step)


def _dropout(shape: Shape, step: Step) -> int:
    # A mask: on a CPU of the dtype of what is dropped, on a GPU a byte each.
    if not shape.dropout:
        return 0
    return step.width if step.kind == "cpu" else 1


def _ends(shape: Shape, step: Step) -> int:
    # Token ids, dropout of the embeddings (float32), the last norm, the input of the head.
    wide = shape.hidden_size
    dropped = 0 if not shape.dropout else FLOAT if step.kind == "cpu" else 1
    segments = 8 if shape.packed else 0
    return 8 + segments + wide * dropped + _norm(wide, 1, step) + step.width * wide


def _loss(shape: Shape, step: Step) -> int:
    # Log-softmax in float32, and the labels shifted by one.
    return step.length * (FLOAT * shape.vocab_size + 8)
