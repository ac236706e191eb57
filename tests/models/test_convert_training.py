"""Training converted models: checkpointing, compilation, Trainer, LoRA."""

import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import whatwhere.models as wm
from convert_cases import NAMED, converted, stock

IDS = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(2))
LEFT = torch.ones_like(IDS)
LEFT[1, :5] = 0


def gradients(model, **given):
    model.zero_grad()
    model(IDS, labels=IDS, **given).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", NAMED)
def test_gradient_checkpointing(family):
    model = converted(family).train()
    plain = gradients(model, attention_mask=LEFT)
    model.gradient_checkpointing_enable()
    again = gradients(model, attention_mask=LEFT)
    assert plain.keys() == again.keys() == dict(model.named_parameters()).keys()
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)
    deltas = [name for name in plain if name.endswith("delta")]
    assert deltas and all(plain[name].abs().max() > 0 for name in deltas)
    with torch.no_grad():
        cache = model.eval()(IDS[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="gradient checkpointing would add anew"):
        model.train()(IDS[:, 4:], past_key_values=cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "encoding"),
    [("llama", "pope"), ("gemma3_text", "rope-id"), ("gpt_neox", "pope"), ("phi3", "rope-id")],
)
def test_compiled_whole(family, encoding):
    torch._dynamo.reset()
    model = converted(family, encoding)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    plain = gradients(copy.deepcopy(model), use_cache=False)
    loss = compiled(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, plain[name], atol=1e-5), name
    with torch.no_grad():
        masked = compiled(IDS, attention_mask=LEFT, use_cache=False).logits
        expected = model(IDS, attention_mask=LEFT, use_cache=False).logits
    assert torch.allclose(masked[LEFT.bool()], expected[LEFT.bool()], atol=1e-4)


@pytest.mark.parametrize("family", NAMED)
def test_traced_whole(family):
    """No break in the graph, padding included; what compiles it is the same for all."""
    torch._dynamo.reset()
    model = converted(family)
    traced = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        found = traced(IDS, attention_mask=LEFT, use_cache=False).logits
        expected = model(IDS, attention_mask=LEFT, use_cache=False).logits
    assert torch.allclose(found[LEFT.bool()], expected[LEFT.bool()], atol=1e-4)


@pytest.mark.slow
def test_compiled_step_of_a_static_cache():
    from transformers import StaticCache

    torch._dynamo.reset()
    model = converted("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for run in (model, compiled):
        cache = StaticCache(config=model.config, max_cache_len=20)
        with torch.no_grad():
            model(IDS, past_key_values=cache, attention_mask=LEFT)
            more = torch.cat((LEFT, torch.ones(2, 8, dtype=LEFT.dtype)), dim=1)
            found.append(run(IDS[:, :1], past_key_values=cache, attention_mask=more).logits)
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.slow
def test_compiled_by_inductor():
    torch._dynamo.reset()
    model = converted("llama")
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        found = torch.compile(model, fullgraph=True)(IDS, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-5)


class Repeats(Dataset):
    """Sequences whose second half is their first: what attention to positions can learn."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        made = torch.Generator().manual_seed(index)
        half = torch.randint(3, 50, (6,), generator=made)
        ids = torch.cat((half, half))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("family", NAMED)
def test_trainer(family, tmp_path):
    model = converted(family, initializer_range=0.02)
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        logging_steps=5,
        save_steps=20,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Repeats())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    deltas = [name for name in before if name.endswith("delta")]
    assert deltas
    assert not any(torch.equal(model.state_dict()[name], before[name]) for name in deltas)
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-20")
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("family", NAMED)
def test_lora(family, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = converted(family)
    settings = peft.LoraConfig(
        r=4,
        target_modules="all-linear",
        modules_to_save=["position_encoding"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    tuned = peft.get_peft_model(copy.deepcopy(model), settings)
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained) and any("delta" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    tuned(IDS, labels=IDS).loss.backward()
    optimizer.step()
    with torch.no_grad():
        expected = tuned.eval()(IDS, attention_mask=LEFT).logits
        assert (expected - model(IDS, attention_mask=LEFT).logits).abs().max() > 0.1
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        plain = tuned.generate(input_ids=IDS, attention_mask=LEFT, use_cache=False, **settings)
        cached = tuned.generate(input_ids=IDS, attention_mask=LEFT, **settings)
        assert torch.equal(plain, cached)
        tuned.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
        assert torch.equal(loaded(IDS, attention_mask=LEFT).logits, expected)
        merged = tuned.merge_and_unload()
        found = merged(IDS, attention_mask=LEFT).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    merged.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    assert torch.equal(again(IDS, attention_mask=LEFT).logits, found)


def test_an_adapter_does_not_name_the_model_that_it_was(tmp_path):
    """PEFT would open that one for it, without the encoding and without a word."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    stock("llama").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    settings = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    tuned = peft.get_peft_model(wm.convert(base, "pope"), peft.LoraConfig(**settings))
    tuned.save_pretrained(tmp_path / "lost")
    assert not peft.PeftConfig.from_pretrained(tmp_path / "lost").base_model_name_or_path
    wm.convert(stock("llama"), "pope").save_pretrained(tmp_path / "converted")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    tuned = peft.get_peft_model(again, peft.LoraConfig(**settings))
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded(IDS).logits, tuned.eval()(IDS).logits)


def test_conversion_after_training_began_keeps_gradients_flowing():
    model = wm.convert(stock("llama").train(), "pope")
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert set(gradients(model)) == set(dict(model.named_parameters()))
