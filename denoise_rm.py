"""Reward modelling with noisy labels: flip the suspicious ones, smooth them, or train with a margin.

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), sections 2.3 to 2.5.

vote_strength.py gives every comparison a strength mu, the mean margin of an ensemble. The paper uses it to swap chosen
and rejected in some pairs, and to give each pair a margin m and a target t:

    L = -E [ t log sigmoid(z) + (1 - t) log sigmoid(-z) ],     z = r(x, y_c) - r(x, y_r) - m

    --percentiles LO HI    train only on pairs between two percentiles of strength             Figs. 4 to 6
    --drop F               drop the weakest fraction F
    --flip F               swap the weakest fraction F; their mu becomes -mu                   section 2.4
    --soft-targets T       t = sigmoid(mu / T)
    --label-smoothing A    t = 1 - A, for all pairs or, with --smooth-on negative, for mu < 0  Eq. 5
    --margin               m = mu, which is negative for suspicious pairs                      Eq. 6

They are applied in this order, and each fraction counts the pairs that the flags before it left. Without any of them
this is baseline_rm.py. With --soft-targets alone, --flip has no effect: it swaps a pair and its target.

The paper's "soft label + margin" can be read in three ways:

    S1, as in the text    --margin --label-smoothing 0.2 --smooth-on negative
    S2                    --margin --label-smoothing 0.2
    S3                    --soft-targets 1

    torchrun denoise_rm.py --flip 0.1                                          the toy world, 20 seconds on a CPU
    torchrun --nproc_per_node 8 denoise_rm.py --model my-sft-model --flip 0.1 --margin        the authors' release
    python denoise_rm.py --flip 0.1 --data runs/vote_strength/train.jsonl      the strengths of your own ensemble

Watch eval/<set>/accuracy on clean labels: in the toy world those of `id`, `ood` and `shifted`, but not of `noisy`.
"""

import argparse
import math
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm.auto import tqdm

from common import (
    RANK, HelpFormatter, batch_indices, clip_gradients, compute_rewards, fatal, in_range,
    load_checkpoint, load_reward_model, load_rows, load_sets, load_tokenizer, log, micro_batches,
    named_source, open_run, print0, save_checkpoint, save_model, setup, tokenize)

TOY_DEFAULTS = {  # replace those of the flags when --model is docs/toy/model
    "data": "docs/toy/voted.jsonl", "epochs": 3.0, "lr": 5e-4, "max_length": 64, "eval_every": 100, "save_every": 100,
    "eval_data": [(name, f"docs/toy/{name}.jsonl") for name in ("id", "ood", "shifted", "noisy")]}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False, epilog=f"toy defaults: {TOY_DEFAULTS}")
    parser.error, add = fatal, parser.add_argument
    add("--model", default="docs/toy/model", help="language model or reward model: folder or hub id")
    add("--data", default="fnlp/hh-rlhf-strength-cleaned", help="comparisons with their strengths: .jsonl, .json (also "
        ".gz), .parquet or hub id[[:config]:split]")
    add("--eval-data", nargs="*", type=named_source, default=[("valid", "fnlp/hh-rlhf-strength-cleaned:validation")],
        metavar="NAME=SOURCE", help="named sets to evaluate on")
    add("--output-dir", default="runs/denoise_rm", help="folder for model/, metrics.jsonl, args.json and checkpoints")
    add("--seed", type=in_range(int, 0), default=0, help="random seed for the reward head and the data order")
    add("--epochs", type=in_range(float, 0.001), default=1.0, help="passes over the data")
    add("--batch-size", type=in_range(int, 1), default=32, help="comparisons per optimizer step, over all ranks")
    add("--lr", type=in_range(float, 0), default=5e-6, help="peak learning rate of AdamW")
    add("--warmup-ratio", type=in_range(float, 0, 1), default=0.1, help="fraction of steps for warm-up, then decay to 0")
    add("--max-grad-norm", type=in_range(float, 0), default=1.0, help="gradients are clipped to this norm; 0: never")
    add("--max-length", type=in_range(int, 2), default=2048, help="max tokens of prompt + response, cut from the left")
    add("--micro-batch-tokens", type=in_range(int, 1), default=8192, help="tokens per forward pass, limits memory only")
    add("--eval-every", type=in_range(int, 0), default=200, help="steps between evaluations; 0: only at the end")
    add("--save-every", type=in_range(int, 0), default=200, help="steps between checkpoints; 0: none")
    add("--resume", action="store_true", help="continue from the last checkpoint in --output-dir")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if torch.cuda.is_available() else "float32",
        help="dtype of the computation; weights, scores and losses are always float32")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, a third slower")
    add("--offload", action="store_true", help="keep weights, gradients and optimizer state in host memory")
    add("--percentiles", type=in_range(float, 0, 100), nargs=2, default=[0.0, 100.0], metavar=("LO", "HI"),
        help="train on the pairs between these percentiles of strength")
    add("--drop", type=in_range(float, 0, 1), default=0.0, help="fraction of the pairs to drop, the weakest ones")
    add("--flip", type=in_range(float, 0, 1), default=0.0, help="fraction of the pairs to flip, the weakest; paper: 0.1")
    add("--margin", action="store_true", help="subtract the strength from the difference of the rewards")
    # UNSTATED: the size of A. The paper's training loss settles at 0.50, the entropy of 0.2.
    add("--label-smoothing", type=in_range(float, 0, 0.5), default=0.0, help="A; the paper: probably 0.2")
    add("--smooth-on", choices=["all", "negative"], default="all", help="smooth all pairs, or those of negative "
        "strength")
    add("--soft-targets", type=in_range(float, 0), default=0.0, help="temperature T of the targets; 0: hard targets")
    if parser.parse_known_args()[0].model == "docs/toy/model":
        parser.set_defaults(**TOY_DEFAULTS)
    return parser.parse_args()


def select_rows(strengths, percentiles=(0, 100), drop=0.0):
    """Strengths (N,) -> sorted row numbers of the pairs between two percentiles, without the weakest fraction."""
    order = np.argsort(strengths, kind="stable")
    low, high = (round(len(order) * percentile / 100) for percentile in percentiles)
    order = order[low:high]
    return np.sort(order[round(len(order) * drop) :])


def make_targets(strengths, flip=0.0, margin=False, label_smoothing=0.0, smooth_on="all", soft_targets=0.0):
    """Strengths (N,) -> whether to swap chosen and rejected (N,), margins m (N,) and targets t (N,)."""
    swap = np.zeros(len(strengths), bool)
    swap[np.argsort(strengths, kind="stable")[: round(len(strengths) * flip)]] = True
    mu = np.where(swap, -strengths, strengths)
    targets = np.ones(len(mu))
    if soft_targets:
        targets = 1 / (1 + np.exp(-mu / soft_targets))
    smoothed = (mu < 0) | (smooth_on == "all")
    targets = np.where(smoothed, targets + label_smoothing * (1 - 2 * targets), targets)
    return swap, mu if margin else np.zeros(len(mu)), targets


def denoised_loss(rewards, margin, target):
    """Eqs. 2, 5 and 6 for each comparison: rewards (B, 2), chosen first, margin (B,), target (B,) -> (B,)."""
    # DEVIATION: as printed, Eq. 6 has the margin outside the sigmoid, where it has no gradient.
    z = rewards[:, 0] - rewards[:, 1] - margin
    return -(target * F.logsigmoid(z) + (1 - target) * F.logsigmoid(-z))


METRICS = "loss", "accuracy", "margin", "tie_rate", "reward_chosen", "reward_rejected"


def metric_sums(rewards):
    """Rewards (B, 2) -> sums of METRICS over the rows (6,), float64. A tie counts as an error; see tie_rate."""
    margin = rewards[:, 0] - rewards[:, 1]
    return torch.stack([-F.logsigmoid(margin), margin > 0, margin, margin == 0, *rewards.T]).double().sum(1)


def evaluate(model, sets, micro_tokens):
    """Means of METRICS on every set -> {"eval/<set>/<metric>": value}, and the accuracies printed."""
    metrics, line = {}, []
    for name, data in sets.items():
        means = metric_sums(compute_rewards(model, data, micro_tokens)) / len(data)
        metrics.update({f"eval/{name}/{key}": value for key, value in zip(METRICS, means.tolist())})
        accuracy = metrics[f"eval/{name}/accuracy"]
        line.append(f"{name} {accuracy:.3f} ± {1.96 * math.sqrt(accuracy * (1 - accuracy) / len(data)):.3f}")
    if sets:
        print0(f"accuracy: {', '.join(line)}")
    return metrics


if __name__ == "__main__":
    args = parse_args()
    device = setup()

    # data and model
    tokenizer = load_tokenizer(args.model)
    train = tokenize(load_rows(args.data), args.data, tokenizer, args.max_length)
    sets = load_sets(args.eval_data, tokenizer, args.max_length)

    # strengths: which rows to train on, and swap, margin and target of each
    column = "mean preference difference"
    strengths = np.zeros(len(train))
    if column in train.column_names:
        strengths = np.array(train[column][:], float)
        train = train.select(np.flatnonzero(np.isfinite(strengths)))  # a row that the voters dropped has none
        strengths = strengths[np.isfinite(strengths)]
    elif args.margin or args.flip or args.drop or args.soft_targets or args.smooth_on == "negative" or (
            args.percentiles != [0, 100]):
        fatal(f"--data {args.data} has no column '{column}': use the train.jsonl that vote_strength.py writes")
    kept = select_rows(strengths, args.percentiles, args.drop)
    if len(kept) == 0:
        fatal("--percentiles and --drop leave no row to train on")
    train = train.select(kept)
    swap, margins, targets = make_targets(strengths[kept], args.flip, args.margin, args.label_smoothing, args.smooth_on,
                                          args.soft_targets)
    print0(f"{len(kept):,} pairs, of which {swap.sum():,} are flipped; mean margin {margins.mean():.3f}, mean target "
           f"{targets.mean():.3f}")
    swap = torch.tensor(swap, device=device)
    margins, targets = (torch.tensor(x, device=device, dtype=torch.float32) for x in (margins, targets))
    model = load_reward_model(args.model, tokenizer, device, args)

    # UNSTATED: the paper gives the learning rate alone. Optimizer and clipping are as in the authors' released trainer.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0,
                                  fused=device.type == "cuda")
    per_epoch = math.ceil(len(train) / args.batch_size)
    steps = math.ceil(per_epoch * args.epochs)
    warmup = max(1, round(steps * args.warmup_ratio))
    start = open_run(args, [args.model, args.data])
    if start:
        load_checkpoint(args.output_dir, model, optimizer, start)

    bar = tqdm(range(start, steps), "training", steps, initial=start, mininterval=1, disable=RANK > 0)
    for step in bar:
        began = time.time()
        # UNSTATED: the schedule. This is the one that the paper gives for SFT: warm-up, then linearly to 0.
        lr = args.lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = lr

        index = batch_indices(len(train), args.batch_size, args.seed, step)
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        objective = torch.zeros(1, device=device)
        for batch in micro_batches(train, index, args.micro_batch_tokens, model):
            rewards = model(batch)  # (B, 2)
            rewards = torch.where(swap[batch.index, None], rewards.flip(1), rewards)
            loss = denoised_loss(rewards, margins[batch.index], targets[batch.index]).sum() / len(index)
            loss.backward()
            objective += loss.detach()
            sums += metric_sums(rewards.detach())
        dist.all_reduce(sums)
        dist.all_reduce(objective)
        grad_norm = clip_gradients(model, args.max_grad_norm)
        metrics = {f"train/{key}": value for key, value in zip(METRICS, (sums / len(index)).tolist())}
        metrics["train/objective"] = objective.item()
        if not math.isfinite(metrics["train/loss"] + grad_norm):
            fatal(f"step {step + 1}: loss {metrics['train/loss']}, gradient norm {grad_norm}: lower the learning rate")
        optimizer.step()
        optimizer.zero_grad()

        speed = len(index) / (time.time() - began)
        metrics.update({"train/grad_norm": grad_norm, "train/lr": lr, "train/pairs_per_sec": speed})
        if step + 1 == steps or args.eval_every and (step + 1) % args.eval_every == 0:
            metrics.update(evaluate(model, sets, args.micro_batch_tokens))
        log(args.output_dir, step + 1, metrics)
        bar.set_postfix(loss=metrics["train/loss"], accuracy=metrics["train/accuracy"], refresh=False)
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < steps:
            save_checkpoint(args.output_dir, model, optimizer, step + 1)

    save_model(f"{args.output_dir}/model", model, tokenizer)
