"""Training speed of a reward model, ours beside the alternatives, in one run, on the same rows with the same model.

    python tests/bench_rm.py --data FILE [--steps 12] [--only ours trl ...]

    ours        shared prompts, honest random batches, rows sorted inside the step and cut into micro-batches
    flex        the same batches by --attention flex: packed rows, FlexAttention, compiled layers; on CUDA alone
    padded      the same batches, each one padded batch of 2B separate rows
    grouped     the same rows, padded and separate, in batches grouped by length (no honest random batches)
    trl         the same rows by TRL's RewardTrainer with its defaults, where `trl` can be imported

The last three compute in bf16 by autocast, which keeps what passes between the layers in fp32; ours do it by FSDP.
Prints a Markdown table. Pairs/s: pairs over seconds, optimizer steps included, after one more step that warms up (on
CUDA, TRL's aside, after all of them once, so that every shape has its kernels).
Tokens/s: of pairs with their prompt once, which is what has to be read. Share of the peak: 6 operations for each of
those tokens and each weight of the layers, over what one large matrix product reaches here. Peak memory: on CUDA.
"""

import argparse
import contextlib
import copy
import gc
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import (  # noqa: E402
    RewardModel, clip_gradients, load_rows, load_tokenizer, micro_batches, one_line, prepare, setup, step_rows,
    tokenize)
from transformers import AutoModelForSequenceClassification, LlamaConfig  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="Anthropic/hh-rlhf", help="as in the scripts")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--micro-tokens", type=int, default=8192 if torch.cuda.is_available() else 1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--gradient-checkpointing", action="store_true", help="of ours")
    parser.add_argument("--only", nargs="*", default=["ours", "flex", "padded", "grouped", "trl"])
    return parser.parse_args()


def new_model(config, tokenizer):
    torch.manual_seed(0)
    config.pad_token_id = tokenizer.pad_token_id
    return AutoModelForSequenceClassification.from_config(copy.deepcopy(config), attn_implementation="sdpa")


def matmul_peak(dtype):
    """Operations/s of one large matrix product, the best of five."""
    size, seconds = 8192 if device.type == "cuda" else 2048, []
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    for _ in range(6):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])


def rows_of(data, index):
    """Separate right-padded rows, chosen first: ids and mask (2B, T)."""
    picked = data[index]
    ids = [torch.tensor(p + r[j]) for j in (0, 1) for p, r in zip(picked["prompt_ids"], picked["response_ids"])]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    return ids.clamp(min=0).to(device), (ids >= 0).long().to(device)


def plain(data, config, tokenizer, args, kind):
    """Pairs/s of one of ours, flex, padded, grouped."""
    model, ours = new_model(config, tokenizer), kind in ("ours", "flex")
    if ours:
        args.attention = "flex" if kind == "flex" else "sdpa"
        model = prepare(RewardModel(model, getattr(torch, args.dtype)), kind, device, args)
    else:
        model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    order = np.argsort(data["length"][:]) if kind == "grouped" else np.arange(len(data))
    batches = np.array_split(order, args.steps)
    warm = batches if device.type == "cuda" else [batches[len(batches) // 2]]
    seconds = []
    for index in [*warm, *batches]:
        began = time.perf_counter()
        if ours:
            for batch in micro_batches(data, index, args.micro_tokens, model):
                rewards = model(batch)
                (-F.logsigmoid(rewards[:, 0] - rewards[:, 1]).sum() / len(index)).backward()
        else:
            ids, mask = rows_of(data, index)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                rewards = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().view(2, -1)
            (-F.logsigmoid(rewards[0] - rewards[1]).mean()).backward()
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return len(data) / sum(seconds[len(warm) :])


def trl(raw, config, tokenizer, args):
    """Pairs/s of TRL's trainer."""
    import transformers
    from trl import RewardConfig, RewardTrainer

    class Clock(transformers.TrainerCallback):
        times = []

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.times.append(time.perf_counter() - self.began)

    model = new_model(config, tokenizer)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        settings = RewardConfig(
            folder, max_steps=args.steps + 1, per_device_train_batch_size=args.batch_size, report_to="none", seed=0,
            max_length=args.max_length, save_strategy="no", use_cpu=device.type == "cpu", bf16=args.dtype == "bfloat16")
        keep = [name for name in raw.column_names if name not in ("prompt", "chosen", "rejected")]
        RewardTrainer(model, settings, train_dataset=raw.remove_columns(keep), processing_class=tokenizer,
                      callbacks=[clock := Clock()]).train()
    return len(raw) / sum(clock.times[1:])


if __name__ == "__main__":
    args = parse_args()
    device = setup(0)
    raw = load_rows(args.data)
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=int(args.hidden * 8 / 3) // 32 * 32,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, max_position_embeddings=args.max_length,
        num_labels=1)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer = load_tokenizer(f"{folder}/config.json", raw)
    data = tokenize(raw.add_column("row", range(len(raw))), args.data, tokenizer, args.max_length)
    data = data.select(step_rows(len(data), args.batch_size * args.steps, 0, 0))
    raw = raw.select(data["row"])
    speed, memory, peak = {}, {}, matmul_peak(getattr(torch, args.dtype))
    with torch.device("meta"):
        layers = AutoModelForSequenceClassification.from_config(config).model.layers
    operations = 6 * np.mean(data["length"]) * sum(p.numel() for p in layers.parameters())  # of a pair
    for name in args.only if device.type == "cuda" else [name for name in args.only if name != "flex"]:
        if device.type == "cuda":
            gc.collect()  # the model before, whose hooks and graphs hold it
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            speed[name] = (trl(raw, config, tokenizer, args) if name == "trl"
                           else plain(data, config, tokenizer, args, name))
        except (ImportError, torch.OutOfMemoryError) as error:
            print(f"{name} is left out: {one_line(error)}", file=sys.stderr)
        memory[name] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else "-"
    print(f"\n{config.num_hidden_layers} layers, hidden {config.hidden_size}, batch {args.batch_size}, {args.dtype}, "
          f"{device.type}, {torch.get_num_threads()} threads, at most {args.max_length} tokens, "
          f"{np.mean(data['length']):.0f} in a pair with its prompt once\n")
    print(f"one matrix product reaches {peak / 1e12:.3f} TFLOP/s\n")
    heads = "variant", "pairs/s", "ratio to ours", "tokens/s", "share of the peak", "peak memory"
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for name, value in speed.items():
        ratio, tokens = value / speed.get("ours", value), value * np.mean(data["length"])
        share = f"{value * operations / peak:.0%}"
        print(f"| {name} | {value:.2f} | {ratio:.2f} | {tokens:.0f} | {share} | {memory[name]} |")
