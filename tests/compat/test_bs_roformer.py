"""BS-RoFormer with ``use_pope`` on PoPE-pytorch and on ours: the same weights, the same model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plain_pope import geometric, off, within
from whatwhere.compat import pope_pytorch as ours

pytest.importorskip("PoPE_pytorch", reason="PoPE-pytorch is not installed")
pytest.importorskip("bs_roformer", reason="BS-RoFormer is not installed")

STFT = {"stft_n_fft": 64, "stft_hop_length": 16, "stft_win_length": 64}
SIZES = {"dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "num_residual_streams": 2}
ONCE = {"time_transformer_depth": 1, "freq_transformer_depth": 1, "use_pope": True}
BANDS = (2,) * 6 + (4,) * 3 + (9,)


def band_split(module: Any) -> nn.Module:
    made: nn.Module = module.BSRoformer(
        freqs_per_bands=BANDS, dim_freqs_in=33, **SIZES, **ONCE, **STFT
    )
    return made


def mel_band(module: Any) -> nn.Module:
    pytest.importorskip("librosa", reason="librosa is not installed")
    made: nn.Module = module.MelBandRoformer(
        num_bands=4, dim_freqs_in=33, sample_rate=8000, **SIZES, **ONCE, **STFT
    )
    return made


MODELS: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "BSRoformer": ("bs_roformer.bs_roformer", band_split),
    "MelBandRoformer": ("bs_roformer.mel_band_roformer", mel_band),
}


@pytest.fixture(params=MODELS)
def sides(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Functions that make the model, one that takes their names and one that takes ours."""
    name, make = MODELS[request.param]
    module = importlib.import_module(name)

    def theirs() -> nn.Module:
        monkeypatch.undo()
        return make(module)

    def mine() -> nn.Module:
        for taken in ("PoPE", "flash_attn_with_pope"):
            monkeypatch.setattr(module, taken, getattr(ours, taken))
        return make(module)

    return theirs, mine


def trained(model: nn.Module) -> nn.Module:
    """Weights of a model that has learned: phases and mixing gates away from where they start."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if name.endswith("pope_embed.bias"):
                weight.copy_(-6 * torch.rand(weight.shape, generator=draw))
            elif weight.is_floating_point():
                weight.add_(0.1 * torch.randn(weight.shape, generator=draw))
    return model


def run(model: nn.Module, audio: Tensor) -> list[Tensor]:
    """The separated audio, and the gradients of it for every parameter, as one."""
    model.zero_grad()
    out = model(audio)
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    phases = [g.flatten() for name, g in sorted(grads.items()) if name.endswith("embed.bias")]
    rest = [g.flatten() for name, g in sorted(grads.items()) if not name.endswith("embed.bias")]
    assert phases
    return [x.detach().double() for x in (out, torch.cat(phases), torch.cat(rest))]


def widest(model: nn.Module) -> nn.Module:
    """In float64, with frequencies that were never in float32."""
    model.double()
    for name, stored in model.named_buffers():
        if name.endswith("inv_freqs"):
            stored.copy_(geometric(stored.shape[0]))
    return model


def test_same_outputs_and_gradients(sides: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 ours is at most twice as far from float64 as theirs."""
    make_theirs, make_ours = sides
    audio = 0.3 * torch.randn(2, 800)
    old = trained(make_theirs())
    state = old.state_dict()
    rounded = run(old, audio)
    exact = make_theirs()
    exact.load_state_dict(state)
    torch.set_default_dtype(torch.float64)
    try:
        wanted = run(widest(exact), audio.double())
    finally:
        torch.set_default_dtype(torch.float32)
    new = make_ours()
    new.load_state_dict(state, strict=True)
    got = run(new, audio)
    within(got, wanted, rounded, torch.float32)
    assert min(float(x.abs().max()) for x in wanted) > 1e-3  # not nothing against nothing


def test_state_dicts_load_both_ways(sides: Any) -> None:
    make_theirs, make_ours = sides
    old = trained(make_theirs())
    audio = 0.3 * torch.randn(1, 500)
    new = make_ours()
    new.load_state_dict(old.state_dict(), strict=True)
    assert any(isinstance(m, ours.PoPE) for m in new.modules())
    assert list(new.state_dict()) == list(old.state_dict())
    with torch.no_grad():
        before = new(audio)
        again = make_ours()
        back = make_theirs()
        back.load_state_dict(trained(new).state_dict(), strict=True)
        again.load_state_dict(back.state_dict(), strict=True)
        for name, x in again.state_dict().items():
            assert torch.equal(x, new.state_dict()[name]), name
    assert not torch.equal(before, new(audio))


def test_a_model_built_on_theirs_may_call_ours(
    sides: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Of two names a user may replace one."""
    make_theirs, _ = sides
    old = trained(make_theirs()).eval()
    audio = 0.3 * torch.randn(1, 500)
    with torch.no_grad():
        wanted = old(audio)
        module = importlib.import_module(type(old).__module__)
        monkeypatch.setattr(module, "flash_attn_with_pope", ours.flash_attn_with_pope)
        torch.testing.assert_close(old(audio), wanted)


def test_autocast(sides: Any) -> None:
    """In bfloat16 by autocast ours is at most twice as far from float32 as theirs."""
    make_theirs, make_ours = sides
    old = trained(make_theirs()).eval()
    audio = 0.3 * torch.randn(1, 500)
    with torch.no_grad():
        wanted = [old(audio).double()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = [old(audio).double()]
            new = make_ours().eval()
            new.load_state_dict(old.state_dict())
            got = [new(audio).double()]
    assert 0 < off(got, wanted)[0] <= 2 * off(rounded, wanted)[0]


def test_one_line_switches_every_importer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of docs/compat.md, before their package is imported."""
    for name in list(sys.modules):
        if name.split(".")[0] == "bs_roformer":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PoPE_pytorch", ours)
    for name, _ in MODELS.values():
        module = importlib.import_module(name)
        assert module.PoPE is ours.PoPE
        assert module.flash_attn_with_pope is ours.flash_attn_with_pope
        monkeypatch.delitem(sys.modules, name)
