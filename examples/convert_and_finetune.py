"""Give a Llama another position encoding, fine-tune it on a book, and use it.

    python examples/convert_and_finetune.py book.txt                  # minutes on two CPU cores
    python examples/convert_and_finetune.py book.txt --model FOLDER   # any model of transformers

Without `--model` it first trains a small Llama (RoPE, bytes as tokens) on the same book.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import whatwhere.models as wm
from whatwhere.lab.data import TextData, TextTask
from whatwhere.lab.finetune.settings import TuningSettings
from whatwhere.lab.finetune.tuning import finetune, prepare

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("book", help="UTF-8 text")
parser.add_argument("--model", help="folder or name of a model; none trains a small one")
parser.add_argument("--output", type=Path, default=Path("runs/convert_and_finetune"))
parser.add_argument("--quick", action="store_true", help="too few steps to learn anything")
given = parser.parse_args()
torch.manual_seed(0)


def small_llama(steps: int, length: int = 128) -> LlamaForCausalLM:
    """A Llama of four layers, trained on windows of `length` bytes of the book."""
    shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": length, "vocab_size": 256}
    model = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None, eos_token_id=None))
    task = TextTask(TextData(paths=(given.book,), length=length, split="position"))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for step in range(steps):
        batch = task.train_batch(seed=0, step=step, batch_size=32)
        loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    print(f"a Llama with RoPE, {steps} steps: training loss {loss:.3f} nats per byte")
    return model.eval()


# 1. Load a model, convert it in place, save it. The command: whatwhere convert MODEL ...
if given.model:
    model = AutoModelForCausalLM.from_pretrained(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    settings = TuningSettings()  # the paper's: 500 steps of 64 windows, 6e-5
else:
    model, tokenizer = small_llama(steps=2 if given.quick else 300), None
    settings = TuningSettings(steps=100, batch_size=8, learning_rate=1e-3, tokens=2**15)


def encode(text: str) -> list[int]:
    """Tokens: the tokenizer's, or bytes."""
    return tokenizer(text).input_ids if tokenizer else list(text.encode())


# PoPE starts from queries and keys that were recombined to fit RoPE's scores on some text
# (docs/from_rope.md).
some = encode(Path(given.book).read_text(encoding="utf-8")[:40_000])[-8 * 128 :]
wm.convert(model, "pope", start="scores", calibration=torch.tensor(some).view(-1, 128))
print(model.cache_report()[0])
converted = given.output / "converted"
model.save_pretrained(converted)
if tokenizer:
    tokenizer.save_pretrained(converted)

# 2. Fine-tune it at four times its length. The command: whatwhere finetune DIR --text BOOK ...
if given.quick:
    settings = TuningSettings(steps=2, batch_size=2, tokens=1024)
tuning = prepare(converted, [given.book], given.output / "finetuned", settings)
losses = finetune(tuning)

# 3. Loss by length, before and after, on the last part of the book, which it was not trained on.
print(losses.pivot(index="length", columns="when", values="loss"))

# 4. Load it (after `import whatwhere.models`), generate, save and load again: the same logits.
model = AutoModelForCausalLM.from_pretrained(tuning.model).eval()
prompt = "It was the"
ids = encode(prompt)
made = model.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)[0].tolist()
print(tokenizer.decode(made) if tokenizer else bytes(made).decode(errors="replace"))
model.save_pretrained(given.output / "saved")
again = AutoModelForCausalLM.from_pretrained(given.output / "saved").eval()
with torch.no_grad():
    assert torch.equal(model(torch.tensor([ids])).logits, again(torch.tensor([ids])).logits)
