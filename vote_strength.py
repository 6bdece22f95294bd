"""Preference strength by voting: which comparisons does an ensemble of reward models agree with?

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), section 2.2.

Train M reward models (Eq. 2) that differ only in their seed: the initial weights of the head and the data order. Each
votes on every comparison with its margin. The strength of a preference is the mean of the votes (Eq. 4):

    d_m  = r_m(x, y_c) - r_m(x, y_r)
    mean = 1/M sum_m d_m                          below 0: the ensemble rejects the label that it was trained on
    std  = sqrt( 1/M sum_m (d_m - mean)^2 )       population std, divided by M

    torchrun vote_strength.py                                                   the toy world, about two minutes
    torchrun --nproc_per_node 8 vote_strength.py --model my-sft-model --data train.jsonl
    python vote_strength.py --eval-data policy=runs/ppo_loop/samples.jsonl      also votes on pairs without a label

The rows are written to <output-dir>/train.jsonl and <output-dir>/<set>.jsonl with the columns of the authors' release.
Watch the printed table: the weakest groups hold the wrong labels (Figs. 2 and 3).

The members are trained one after the other. To train one on each GPU, start several processes on the same folder, then
count: `CUDA_VISIBLE_DEVICES=3 python vote_strength.py --resume --seed 3 --members 1 &` and so on for every seed, then
`wait; python vote_strength.py --resume`.
"""

import argparse
import gc
import json
import math
import os
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm.auto import tqdm

from common import (
    RANK, HelpFormatter, atomic_write, batch_indices, clip_gradients, compute_rewards, fatal,
    in_range, load_reward_model, load_rows, load_tokenizer, log, micro_batches, named_source,
    open_run, print0, setup, tokenize)

TOY_DEFAULTS = {  # replace those of the flags when --model is docs/toy/model
    "data": "docs/toy/train.jsonl", "epochs": 3.0, "lr": 5e-4, "max_length": 64,
    "eval_data": [(name, f"docs/toy/{name}.jsonl") for name in ("id", "ood", "shifted", "noisy")]}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False, epilog=f"toy defaults: {TOY_DEFAULTS}")
    parser.error, add = fatal, parser.add_argument
    add("--model", default="docs/toy/model", help="language model or reward model: folder or hub id")
    add("--data", default="Anthropic/hh-rlhf", help=".jsonl, .json (also .gz), .parquet or hub id[[:config]:split]")
    add("--eval-data", nargs="*", type=named_source, default=[("test", "Anthropic/hh-rlhf:test")],
        metavar="NAME=SOURCE", help="named sets to vote on, not to train on: comparisons, or "
        "rows of `responses`, which are then paired")
    add("--output-dir", default="runs/vote_strength", help="folder for train.jsonl, NAME.jsonl and seed-*/votes.json")
    add("--seed", type=in_range(int, 0), default=0, help="random seed of the first member; the next ones follow")
    add("--members", type=in_range(int, 1), default=10, help="M, the number of reward models")
    add("--epochs", type=in_range(float, 0.001), default=1.0, help="passes over the data")
    add("--batch-size", type=in_range(int, 1), default=32, help="comparisons per optimizer step, over all ranks")
    add("--lr", type=in_range(float, 0), default=5e-6, help="peak learning rate of AdamW")
    add("--warmup-ratio", type=in_range(float, 0, 1), default=0.1, help="fraction of steps for warm-up, then decay to 0")
    add("--max-grad-norm", type=in_range(float, 0), default=1.0, help="gradients are clipped to this norm; 0: never")
    add("--max-length", type=in_range(int, 2), default=2048, help="max tokens of prompt + response, cut from the left")
    add("--micro-batch-tokens", type=in_range(int, 1), default=8192, help="tokens per forward pass, limits memory only")
    add("--resume", action="store_true", help="train only the members whose votes --output-dir lacks")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if torch.cuda.is_available() else "float32",
        help="dtype of the computation; weights, scores and losses are always float32")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, a third slower")
    add("--offload", action="store_true", help="keep weights, gradients and optimizer state in host memory")
    if parser.parse_known_args()[0].model == "docs/toy/model":
        parser.set_defaults(**TOY_DEFAULTS)
    return parser.parse_args()


def strength(votes):
    """Eq. 4: rewards (M, N, 2) of M members, chosen first -> mean (N,) and population std (N,) of their margins."""
    margins = votes[..., 0] - votes[..., 1]
    return margins.mean(0), margins.std(0)


def pair_responses(rows):
    """Rows of comparisons as they are; rows of k responses as the k // 2 disjoint pairs of each. Which one is called
    chosen is then arbitrary."""
    if "chosen" in rows.column_names or "responses" not in rows.column_names:
        return rows
    pairs = [{"prompt": row.get("prompt"), "chosen": chosen, "rejected": rejected}
             for row in rows for chosen, rejected in zip(row["responses"][::2], row["responses"][1::2])]
    return datasets.Dataset.from_list(pairs) if pairs else fatal("--eval-data: rows need two `responses` to vote on")


def train_member(train, tokenizer, device, args):
    """Train one reward model with args.seed by the loop of baseline_rm.py. -> RewardModel"""
    model = load_reward_model(args.model, tokenizer, device, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0,
                                  fused=device.type == "cuda")
    steps = math.ceil(math.ceil(len(train) / args.batch_size) * args.epochs)
    warmup = max(1, round(steps * args.warmup_ratio))
    bar = tqdm(range(steps), f"seed {args.seed}", mininterval=1, disable=RANK > 0)
    for step in bar:
        lr = args.lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = lr

        index = batch_indices(len(train), args.batch_size, args.seed, step)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in micro_batches(train, index, args.micro_batch_tokens, model):
            rewards = model(batch)  # (B, 2)
            margin = rewards[:, 0] - rewards[:, 1]
            loss = -F.logsigmoid(margin).sum() / len(index)  # Eq. 2
            loss.backward()
            sums += torch.stack([loss.detach(), (margin > 0).sum() / len(index)])
        dist.all_reduce(sums)
        grad_norm = clip_gradients(model, args.max_grad_norm)
        loss, accuracy = sums.tolist()
        if not math.isfinite(loss + grad_norm):
            fatal(f"step {step + 1}: loss {loss}, gradient norm {grad_norm}: lower the learning rate")
        optimizer.step()
        optimizer.zero_grad()

        log(f"{args.output_dir}/seed-{args.seed}", step + 1, {
            "train/loss": loss, "train/accuracy": accuracy, "train/grad_norm": grad_norm, "train/lr": lr})
        bar.set_postfix(loss=loss, accuracy=accuracy, refresh=False)
    return model


def write_votes(path, rows, index, votes):
    """Write the raw rows as JSON lines with the votes (M, N, 2) for the rows `index` (N,), in the columns of the
    authors' release; null where a row was dropped."""
    mean, std = strength(votes)
    columns = {"chosen score list": votes[..., 0].T, "rejected score list": votes[..., 1].T,
               "mean preference difference": mean, "std preference difference": std}
    for name, values in columns.items():
        column = [None] * len(rows)
        for i, value in zip(index, values.tolist()):
            column[i] = value
        if name in rows.column_names:
            rows = rows.remove_columns(name)
        rows = rows.add_column(name, column)
    tmp = Path(f"{path}.{os.getpid()}.tmp")
    rows.to_json(tmp)
    tmp.replace(path)


def print_groups(mean, std, label, num_groups=20):
    """Figs. 2 and 3 as a table: sort by mean strength, cut into equal groups, print the means of mean and std, and how
    often a second label (1: chosen, 0: rejected, anything else: neither) agrees with the first."""
    print0("training set, weakest first\n  rows up to    mean     std   second label agrees")
    num_groups = min(num_groups, len(mean))
    groups = np.array_split(np.argsort(mean, kind="stable"), num_groups)
    for i, group in enumerate(groups, 1):
        sides = [value for value in label[group] if value in (0, 1)]
        agreement = f"{np.mean(sides):.3f}" if sides else "-"
        print0(f"{i / num_groups:12.0%}{mean[group].mean():8.3f}{std[group].mean():8.3f}{agreement:>9}")


if __name__ == "__main__":
    args = parse_args()
    device = setup()

    # data
    sources = {"train": args.data, **dict(args.eval_data)}
    if len(sources) < 1 + len(args.eval_data):
        fatal("--eval-data: names must be unique and not `train`")
    tokenizer = load_tokenizer(args.model)
    raw = {"train": load_rows(args.data)}
    raw.update({name: pair_responses(load_rows(source, "test")) for name, source in args.eval_data})
    sets = {name: tokenize(rows, sources[name], tokenizer, args.max_length) for name, rows in raw.items()}
    open_run(args, [args.model, *sources.values()], may_change=["seed", "members"])

    # train the members, each of which leaves its votes
    paths = []
    for seed in range(args.seed, args.seed + args.members):
        folder = Path(args.output_dir, f"seed-{seed}")
        paths.append(folder / "votes.json")
        if not paths[-1].exists():
            if RANK == 0:
                folder.mkdir(exist_ok=True)
                Path(folder, "metrics.jsonl").unlink(missing_ok=True)
            args.seed = seed
            model = train_member(sets["train"], tokenizer, device, args)
            votes = {name: compute_rewards(model, data, args.micro_batch_tokens).tolist() for name, data in sets.items()}
            if RANK == 0:
                atomic_write(paths[-1], json.dumps(votes))
            del model  # or the next one would be loaded beside it
            gc.collect()

    # count the votes
    if RANK == 0:
        members = [json.loads(path.read_text()) for path in paths]
        for name, rows in raw.items():
            votes = np.array([member[name] for member in members])
            write_votes(f"{args.output_dir}/{name}.jsonl", rows, sets[name]["row"][:], votes)
            mean, std = strength(votes)
            print0(f"{name}: mean strength below 0 in {np.mean(mean < 0):.1%} of {len(mean):,} rows")
            if name == "train":
                column = next((x for x in ("gold", "GPT4 label") if x in rows.column_names), None)
                label = np.array(sets[name][column][:]) if column else np.full(len(mean), -1)
                print_groups(mean, std, label)
    dist.barrier()
