"""Preference strength by voting: measure each preference by the votes of ten reward models.

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), section 2.2.

Train M reward models (Eq. 2) that differ only in their seed: the initial weights of the head, if it
is new, and the data order. Each votes on every comparison with its margin. The strength of a
preference is the mean of the votes (Eq. 4):

    d_m  = r_m(x, y_c) - r_m(x, y_r)
    mean = 1/M sum_m d_m                        below 0: the ensemble disagrees with the label
    std  = sqrt( 1/M sum_m (d_m - mean)^2 )     population std, divided by M

    torchrun vote_strength.py                               the toy world, two minutes on a CPU
    torchrun --nproc_per_node 8 vote_strength.py --model my-sft-model --data train.jsonl
    python vote_strength.py --eval-data policy=runs/ppo_loop/samples.jsonl

The third command also votes on pairs without a label. The rows are written to
<output-dir>/train.jsonl and <output-dir>/<set>.jsonl, with the columns of the authors' release.
Look at the printed table: the weakest groups hold the wrong labels (Figs. 2 and 3).

The members are trained one after the other. To train one on each GPU, start several processes on
the same folder, with --resume, or each would rename the folder of the others. Then count the votes:

    for seed in 0 1 2 3; do
        CUDA_VISIBLE_DEVICES=$seed python vote_strength.py --resume --seed $seed --members 1 &
    done; wait
    python vote_strength.py --resume --members 4
"""

import argparse
import json
import math
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm.auto import tqdm

from common import (
    RANK, TOY_DATA, HelpFormatter, atomic_write, batch_indices, clip_gradients, compute_rewards,
    default_max_length, fatal, in_range, is_toy, load_reward_model, load_rows, load_tokenizer, log,
    micro_batches, named_source, open_run, print0, setup, tokenize)

TOY_SETTINGS = {"epochs": 3.0, "lr": 5e-4, "max_length": 64}
COLUMNS = ["chosen score list", "rejected score list",  # those of the authors' release
           "mean preference difference", "std preference difference"]


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False,
        epilog=f"without --model: the toy data, and the defaults {TOY_SETTINGS}")
    parser.error = fatal  # one line, without the usage
    add = parser.add_argument
    # the method
    add("--members", type=in_range(int, 1), default=10, help="M, the number of reward models")

    # as in baseline_rm.py
    add("--model",
        help="language model or reward model: folder or hub id; by default that of the toy world")
    add("--data", default="Anthropic/hh-rlhf",
        help=".jsonl, .json (also .gz), .parquet or hub id[[:config]:split]")
    add("--eval-data", nargs="*", type=named_source, metavar="NAME=SOURCE",
        default=[("test", "Anthropic/hh-rlhf:test")], help="named sets to vote on, not to train "
        "on: comparisons, or rows of `responses`, which are then paired")
    add("--output-dir", default="runs/vote_strength",
        help="folder for train.jsonl, NAME.jsonl and seed-*/votes.json")
    add("--seed", type=in_range(int, 0), default=0,
        help="random seed of the first member; the next ones follow")
    add("--epochs", type=in_range(float, 0.001), default=1.0, help="passes over the data")
    add("--batch-size", type=in_range(int, 1), default=32,
        help="comparisons per optimizer step, over all ranks")
    add("--lr", type=float, default=5e-6, help="peak learning rate of AdamW")
    add("--warmup-ratio", type=in_range(float, 0, 1), default=0.1,
        help="fraction of steps for linear warm-up, followed by linear decay to 0")
    add("--max-grad-norm", type=in_range(float, 0), default=1.0,
        help="gradients are clipped to this norm; 0: never")
    add("--max-length", type=int,
        help="maximum length of prompt plus response in tokens; longer prompts are truncated from "
        "the left; by default what the model can read, at most 2048")
    add("--micro-batch-tokens", type=int, default=8192,
        help="tokens per forward pass: changes memory and speed, not the result")
    add("--resume", action="store_true", help="train only members without votes in --output-dir")
    add("--dtype", choices=["float32", "bfloat16"],
        default="bfloat16" if torch.cuda.is_available() else "float32",
        help="dtype of the computation; weights, scores and losses are always float32")
    add("--gradient-checkpointing", action="store_true",
        help="recompute activations in the backward pass: less memory, about a third slower")
    add("--offload", action="store_true",
        help="keep weights, gradients and optimizer state in host memory")
    if is_toy(parser.parse_known_args()[0].model):
        parser.set_defaults(**TOY_DATA | TOY_SETTINGS)
        print0(f"toy world, with the defaults {TOY_SETTINGS}")
    return parser.parse_args()


def strength(votes):
    """Eq. 4: rewards (M, N, 2) of M members, chosen first -> mean (N,) and population std (N,)."""
    margins = votes[..., 0] - votes[..., 1]
    return margins.mean(0), margins.std(0)


def pair_responses(rows, source):
    """Comparisons as they are; rows of k responses as the k // 2 disjoint pairs of each.

    Which response of such a pair is called chosen is arbitrary."""
    if "chosen" in rows.column_names or "responses" not in rows.column_names:
        return rows
    pairs = []
    for row in rows:
        responses = row["responses"] or []
        for chosen, rejected in zip(responses[::2], responses[1::2]):
            pairs.append({"prompt": row.get("prompt"), "chosen": chosen, "rejected": rejected})
    if not pairs:
        fatal(f"{source}: rows need two `responses` to vote on")
    return datasets.Dataset.from_list(pairs)


def train_member(train, tokenizer, device, args, seed):
    """Train one reward model by the loop of baseline_rm.py. -> RewardModel"""
    args.seed = seed  # of the head
    model = load_reward_model(args.model, tokenizer, device, args)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0,
        fused=device.type == "cuda")
    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    steps = math.ceil(steps_per_epoch * args.epochs)
    warmup = max(1, round(steps * args.warmup_ratio))

    bar = tqdm(range(steps), f"seed {seed}", mininterval=1, disable=RANK > 0)
    for step in bar:
        done = step + 1
        lr = args.lr * min(done / warmup, (steps - step) / max(1, steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # the gradient of Eq. 2
        index = batch_indices(len(train), args.batch_size, seed, step)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in micro_batches(train, index, args.micro_batch_tokens, model):
            rewards = model(batch)  # (B, 2), chosen first
            margin = rewards[:, 0] - rewards[:, 1]
            loss = -F.logsigmoid(margin).sum() / len(index)
            loss.backward()
            accuracy = (margin > 0).sum() / len(index)
            sums += torch.stack([loss.detach(), accuracy])
        dist.all_reduce(sums)
        loss, accuracy = sums.tolist()

        # the optimizer step
        grad_norm = clip_gradients(model, args.max_grad_norm)
        if not math.isfinite(loss + grad_norm):
            fatal(f"step {done}: the loss or its gradient is not finite: lower the learning rate")
        optimizer.step()
        optimizer.zero_grad()

        metrics = {"train/loss": loss, "train/accuracy": accuracy,
                   "train/grad_norm": grad_norm, "train/lr": lr}
        log(f"{args.output_dir}/seed-{seed}", done, metrics)
        bar.set_postfix(loss=loss, accuracy=accuracy, refresh=False)
    return model


def write_votes(path, rows, index, votes):
    """Write the raw rows as JSON lines, with the votes (M, N, 2) for the rows `index` (N,).

    The columns are those of the authors' release, and null where a row was dropped."""
    mean, std = strength(votes)
    columns = [x.tolist() for x in (votes[..., 0].T, votes[..., 1].T, mean, std)]
    values = dict(zip(index, zip(*columns)))  # row number: its COLUMNS

    lines = []
    for i, row in enumerate(rows):
        row.update(zip(COLUMNS, values.get(i, [None] * 4)))
        lines.append(json.dumps(row, default=str) + "\n")
    atomic_write(path, "".join(lines))


def print_groups(name, mean, std, label):
    """Figs. 2 and 3 as a table: the pairs in 20 groups, weakest first, with the means of `mean` and
    `std`, and how often a second label (1: chosen, 0: rejected, else neither) agrees."""
    print0(f"{name}, weakest first\n  rows up to    mean     std   second label agrees")
    groups = np.array_split(np.argsort(mean, kind="stable"), min(20, len(mean)))
    for i, group in enumerate(groups, 1):
        known = [value for value in label[group] if value in (0, 1)]
        agreement = f"{np.mean(known):.3f}" if known else "-"
        print0(f"{i / len(groups):12.0%}{mean[group].mean():8.3f}{std[group].mean():8.3f}"
               f"{agreement:>9}")


if __name__ == "__main__":
    args = parse_args()
    device = setup()

    # data
    sources = {"train": args.data, **dict(args.eval_data)}
    if "train" in dict(args.eval_data):
        fatal("--eval-data: a set cannot have the name train")
    tokenizer = load_tokenizer(args.model)
    args.max_length = args.max_length or default_max_length(args.model)
    raw = {"train": load_rows(args.data)}
    for name, source in args.eval_data:
        raw[name] = pair_responses(load_rows(source, "test"), source)
    sets = {}
    for name, rows in raw.items():
        sets[name] = tokenize(rows, sources[name], tokenizer, args.max_length)
    open_run(args, [args.model, *sources.values()], may_change=["seed", "members"])

    # train the members, each of which leaves its votes
    paths = []
    for seed in range(args.seed, args.seed + args.members):
        folder = Path(args.output_dir, f"seed-{seed}")
        paths.append(folder / "votes.json")
        if paths[-1].exists():
            continue
        if RANK == 0:
            folder.mkdir(exist_ok=True)
            Path(folder, "metrics.jsonl").unlink(missing_ok=True)
        model = train_member(sets["train"], tokenizer, device, args, seed)
        votes = {}
        for name, data in sets.items():
            votes[name] = compute_rewards(model, data, args.micro_batch_tokens).tolist()
        if RANK == 0:
            atomic_write(paths[-1], json.dumps(votes))
        del model  # or the next one would be loaded beside it

    # count the votes
    if RANK == 0:
        members = [json.loads(path.read_text()) for path in paths]
        for name, rows in raw.items():
            votes = np.array([member[name] for member in members])
            write_votes(f"{args.output_dir}/{name}.jsonl", rows, sets[name]["row"][:], votes)
            mean, std = strength(votes)
            print0(f"{name}: strength below 0 in {np.mean(mean < 0):.1%} of {len(mean):,} rows")
            if name == "train" or "GPT4 label" in rows.column_names:
                label = np.full(len(mean), -1)
                for column in ("GPT4 label", "gold"):
                    if column in rows.column_names:
                        label = np.array(sets[name][column][:], float)
                print_groups(name, mean, std, label)
    dist.barrier()
