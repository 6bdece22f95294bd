"""Training speed of a reward model: ours beside the usual ways, on the same comparisons and the same random weights.

    python tests/bench.py --data FILE [--only ours padded ...]

    ours          shared prompts; the rows of a batch sorted by length and cut into micro-batches
    padded        a row for each response, padded, --micro-batch-size comparisons in a forward pass
    grouped       the same in batches of similar length, which are no longer random batches
    trl           TRL's RewardTrainer at its defaults: gradient checkpointing, one forward pass for each batch
    trl-fast      TRL without gradient checkpointing, --micro-batch-size comparisons in a forward pass
    trl-grouped   the same in the batches of `grouped`

The model is a Llama with random weights and a BPE trained on the data. The variants take turns; each turn begins with
warm-up steps, one on a CPU, all on CUDA. Prints medians, or nan if trl is not installed. Useful tokens exclude padding
and count a prompt once; each costs 6 FLOPs per weight of the layers. The peak is that of one matrix product.
"""

import argparse
import gc
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
from baseline_rm import preference_loss  # noqa: E402

CUDA = torch.cuda.is_available()
VARIANTS = "ours", "padded", "grouped", "trl", "trl-fast", "trl-grouped"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="Anthropic/hh-rlhf", help="as in the scripts")
    add("--steps", type=int, default=8, help="optimizer steps in a turn")
    add("--reps", type=int, default=1, help="turns of each variant")
    add("--batch-size", type=int, default=16, help="comparisons per step")
    add("--max-length", type=int, default=512, help="maximum length of prompt plus response in tokens")
    add("--micro-batch-tokens", type=int, default=8192 if CUDA else 1024, help="tokens per micro-batch of `ours`")
    add("--micro-batch-size", type=int, default=16 if CUDA else 1, help="comparisons; divides --batch-size")
    add("--hidden-size", type=int, default=512, help="a multiple of 64")
    add("--layers", type=int, default=6)
    add("--dtype", default="bfloat16" if CUDA else "float32", choices=["float32", "bfloat16"])
    add("--keep", metavar="FOLDER", help="keep the random model there, for runs of the scripts")
    add("--only", nargs="*", default=VARIANTS, choices=VARIANTS, metavar="VARIANT", help="measure only these")
    parser.set_defaults(seed=0, gradient_checkpointing=False, offload=False)  # read by load_reward_model
    return parser.parse_args()


def make_model(folder, rows, args):
    """Save a random reward model; -> its tokenizer, trained on the rows, and the number of weights in its layers."""
    texts = [prompt + responses[0] for prompt, responses in map(common.read_row, rows) if prompt]
    tokenizer = transformers.GPT2Tokenizer(pad_token="<pad>").train_new_from_iterator(texts, 8192, show_progress=False)
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
        vocab_size=8192, hidden_size=args.hidden_size, intermediate_size=args.hidden_size * 8 // 96 * 32,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden_size // 64, num_labels=1,
        max_position_embeddings=args.max_length, pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, sum(p.numel() for p in model.model.layers.parameters())


def now():
    """Seconds on the clock once the GPU has finished."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_peak(dtype, device):
    """Operations per second of one large matrix product."""
    size = 8192 if CUDA else 2048
    a, b = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.timeit(5).median


def time_ours(model, data, batches, warmup, args):
    """Seconds for one optimizer step on each of the batches, which are arrays of row numbers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=CUDA)
    for step, index in enumerate([*batches[:warmup], *batches]):
        if step == warmup:
            began = now()
        if model.share:
            parts = common.micro_batches(data, index, args.micro_batch_tokens, model)
        else:
            parts = (common.collate(data, part, model.device, share=False)
                     for part in np.split(index, len(index) // args.micro_batch_size))
        for batch in parts:
            (preference_loss(model(batch)).sum() / len(index)).backward()
        common.clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return now() - began


def time_trl(folder, pairs, batches, warmup, default, args):
    """The same for TRL, whose warm-up steps take the first batches, which then come again at the end."""
    from trl import RewardConfig, RewardTrainer

    times, clock = [], transformers.TrainerCallback()
    clock.on_step_end = lambda *_, **__: times.append(now())
    rows = [{"chosen_ids": pairs[i][0], "rejected_ids": pairs[i][1]} for i in np.concatenate(batches)]
    micro = args.batch_size if default else args.micro_batch_size
    config = RewardConfig(
        folder, max_steps=warmup + len(batches), gradient_checkpointing=default, per_device_train_batch_size=micro,
        gradient_accumulation_steps=args.batch_size // micro, bf16=args.dtype == "bfloat16", use_cpu=not CUDA,
        train_sampling_strategy="sequential", max_length=None, save_strategy="no", report_to="none", disable_tqdm=True)
    RewardTrainer(folder, config, train_dataset=datasets.Dataset.from_list(rows), callbacks=[clock]).train()
    return times[-1] - times[warmup - 1]


if __name__ == "__main__":
    args, temporary = parse_args(), tempfile.TemporaryDirectory()
    folder = args.keep or temporary.name
    device, raw = common.setup(), common.load_rows(args.data)
    tokenizer, weights = make_model(folder, raw, args)
    data = common.tokenize(raw, args.data, tokenizer, args.max_length)
    data = data.select(common.batch_indices(len(data), args.batch_size * args.steps, args.seed, 0))
    pairs = [[row["prompt_ids"] + response for response in row["response_ids"]] for row in data]
    batches = np.split(np.arange(len(data)), args.steps)
    grouped = np.split(np.argsort([max(map(len, pair)) for pair in pairs], kind="stable"), args.steps)
    warmup, tokens, peak = args.steps if CUDA else 1, np.mean(data["length"]), measure_peak(args.dtype, device)
    memory, seconds = {}, {name: [] for name in args.only}
    for name in [*args.only] * args.reps:
        order = grouped if "grouped" in name else batches
        if CUDA:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
        if not name.startswith("trl"):
            model = common.load_reward_model(folder, tokenizer, device, args)
            model.share = name == "ours"
            seconds[name].append(time_ours(model, data, order, warmup, args))
            del model
        elif find_spec("trl"):
            seconds[name].append(time_trl(folder, pairs, order, warmup, name == "trl", args))
        memory[name] = torch.cuda.max_memory_allocated() / 2**30

    speeds = {name: len(data) / np.median(times or np.nan) for name, times in seconds.items()}
    print(f"{vars(args)}\n{device}, {torch.get_num_threads()} threads, peak {peak:.2e}/s, {tokens:.0f} tokens a pair")
    print("\n| variant | pairs/s | ratio to ours | useful tokens/s | of peak | GPU memory |\n|---|---|---|---|---|---|")
    for name, speed in speeds.items():
        ratio, share = speed / speeds.get("ours", np.nan), 6 * speed * tokens * weights / peak
        print(f"| {name} | {speed:.2f} | {ratio:.2f} | {speed * tokens:.0f} | {share:.0%} | {memory[name]:.1f} GiB |")
