"""Reward modelling with noisy labels: flip suspicious ones, soften them, or train with a margin.

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), sections 2.3
to 2.5.

vote_strength.py gives every comparison a strength mu, the mean reward difference in an ensemble. It
is negative where the ensemble disagrees with the label. The paper uses mu to swap chosen and
rejected in some pairs, and to give each pair a margin m and a target t:

    L = -E [ t log sigmoid(z) + (1 - t) log sigmoid(-z) ],     z = r(x, y_c) - r(x, y_r) - m

    --percentiles LO HI    train only on pairs between two percentiles of strength   Figs. 4 to 6
    --drop F               drop the weakest fraction F
    --flip F               swap the weakest fraction F; their mu becomes -mu         section 2.4
    --soft-targets T       t = sigmoid(mu / T)
    --label-smoothing A    t <- (1 - A) t + A (1 - t), which makes 1 - A of t = 1    Eq. 5
                           with --smooth-on negative only where mu < 0
    --margin               m = mu, which is negative for suspicious pairs            Eq. 6

They are applied in this order, and each fraction counts the pairs that the flags before it left.
Without any of them this is baseline_rm.py. With --soft-targets, --flip does not change what is
learned, because a swapped pair with the opposite target has the same loss. The exception is
--smooth-on negative.

The paper's "soft label + margin" can be read in three ways:

    S1, as in the paper's text    --margin --label-smoothing 0.2 --smooth-on negative
    S2                            --margin --label-smoothing 0.2
    S3                            --soft-targets 1

    torchrun denoise_rm.py --soft-targets 1                    the toy world, 20 seconds on a CPU
    torchrun --nproc_per_node 8 denoise_rm.py --model my-sft-model --soft-targets 1
    python denoise_rm.py --soft-targets 1 --data runs/vote_strength/train.jsonl

The second command trains on the authors' release, the third on the strengths of your own ensemble.
Watch eval/<set>/accuracy on clean labels. In the toy world, the labels of `noisy` are not clean.

In another trainer you need the column "mean preference difference" of vote_strength.py,
`make_targets`, which also says what pairs to swap, and `denoised_loss`. TRL's RewardTrainer
subtracts a column `margin` inside the sigmoid, as --margin does. Soft targets need a compute_loss.
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
    RANK, TOY, TOY_DATA, HelpFormatter, batch_indices, clip_gradients, compute_rewards,
    default_max_length, fatal, in_range, is_toy, load_checkpoint, load_reward_model, load_rows,
    load_sets, load_tokenizer, log, micro_batches, named_source, open_run, print0, save_checkpoint,
    save_model, setup, tokenize)

TOY_SETTINGS = {
    "data": f"{TOY}/voted.jsonl", "epochs": 3.0, "lr": 5e-4, "max_length": 64, "eval_every": 100,
    "save_every": 100}
STRENGTH = "mean preference difference"  # the column that vote_strength.py writes


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False,
        epilog=f"without --model: the toy data, and the defaults {TOY_SETTINGS}")
    parser.error = fatal  # one line, without the usage
    add = parser.add_argument
    # the method
    add("--percentiles", type=in_range(float, 0, 100), nargs=2, default=[0.0, 100.0],
        metavar=("LO", "HI"), help="train on the pairs between these percentiles of strength")
    add("--drop", type=in_range(float, 0, 1), default=0.0, metavar="F",
        help="fraction of the pairs to drop, the weakest ones")
    add("--flip", type=in_range(float, 0, 1), default=0.0, metavar="F",
        help="fraction of the pairs to flip, the weakest ones; paper: 0.1")
    add("--soft-targets", type=in_range(float, 0), default=0.0, metavar="T",
        help="temperature T of the targets; 0: hard targets")
    # UNSTATED: the size of A. The paper's training loss settles at 0.50, the entropy for A = 0.2.
    add("--label-smoothing", type=in_range(float, 0, 0.5), default=0.0, metavar="A",
        help="size of the smoothing, probably 0.2 in the paper")
    add("--smooth-on", choices=["all", "negative"], default="all",
        help="smooth all pairs, or those of negative strength after --flip")
    add("--margin", action="store_true",
        help="subtract the strength from the difference of the rewards")

    # as in baseline_rm.py
    add("--model",
        help="language model or reward model: folder or hub id; by default that of the toy world")
    add("--data", default="fnlp/hh-rlhf-strength-cleaned", help="comparisons with their strengths: "
        ".jsonl, .json (also .gz), .parquet or hub id[[:config]:split]")
    add("--eval-data", nargs="*", type=named_source, metavar="NAME=SOURCE",
        default=[("valid", "fnlp/hh-rlhf-strength-cleaned:validation")],
        help="named sets to evaluate on")
    add("--output-dir", default="runs/denoise_rm",
        help="folder for model/, metrics.jsonl, args.json and checkpoints")
    add("--seed", type=in_range(int, 0), default=0,
        help="random seed for the reward head and the data order")
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
    add("--eval-every", type=int, default=200,
        help="steps between evaluations; 0: only at the end")
    add("--save-every", type=int, default=200,
        help="steps between checkpoints; 0: none")
    add("--resume", action="store_true", help="continue from the last checkpoint in --output-dir")
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


def select_rows(strengths, percentiles=(0, 100), drop=0.0):
    """Strengths (N,) -> sorted row numbers of the pairs to train on.

    They lie between two percentiles, and the weakest fraction `drop` of them is left out."""
    order = np.argsort(strengths, kind="stable")
    low = round(len(order) * percentiles[0] / 100)
    high = round(len(order) * percentiles[1] / 100)
    order = order[low:high]
    return np.sort(order[round(len(order) * drop) :])


def make_targets(strengths, flip=0.0, margin=False, label_smoothing=0.0, smooth_on="all",
                 soft_targets=0.0):
    """Strengths (N,) -> whether to swap a pair (N,), its margin m (N,) and its target t (N,)."""
    swap = np.zeros(len(strengths), bool)
    weakest = np.argsort(strengths, kind="stable")[: round(len(strengths) * flip)]
    swap[weakest] = True
    mu = np.where(swap, -strengths, strengths)

    targets = np.ones(len(mu))
    if soft_targets:
        targets = torch.sigmoid(torch.tensor(mu / soft_targets)).numpy()
    smoothed = (1 - label_smoothing) * targets + label_smoothing * (1 - targets)
    is_smoothed = (mu < 0) | (smooth_on == "all")
    targets = np.where(is_smoothed, smoothed, targets)

    margins = mu if margin else np.zeros(len(mu))
    return swap, margins, targets


def denoised_loss(rewards, margin, target):
    """Eqs. 2, 5 and 6 for each comparison: rewards (B, 2), chosen first, margins m (B,) and targets
    t (B,) -> (B,)."""
    # DEVIATION: as printed, Eq. 6 has the margin outside the sigmoid, where it changes no gradient.
    z = rewards[:, 0] - rewards[:, 1] - margin
    return -(target * F.logsigmoid(z) + (1 - target) * F.logsigmoid(-z))


METRICS = "loss", "accuracy", "margin", "tie_rate", "reward_chosen", "reward_rejected"


def metric_sums(rewards):
    """Rewards (B, 2), chosen first -> sums of METRICS over the batch (6,), float64."""
    chosen, rejected = rewards.unbind(1)
    margin = chosen - rejected
    loss = -F.logsigmoid(margin)  # Eq. 2, whatever is trained on
    is_right = margin > 0  # a tie counts as an error
    is_tie = margin == 0
    return torch.stack([loss, is_right, margin, is_tie, chosen, rejected]).double().sum(1)


def evaluate(model, sets, micro_tokens, step):
    """Means of METRICS on every set -> {"eval/<set>/<metric>": value}; prints the accuracies."""
    metrics = {}
    line = ""
    for name, data in sets.items():
        rewards = compute_rewards(model, data, micro_tokens)
        means = metric_sums(rewards) / len(data)
        for key, value in zip(METRICS, means.tolist()):
            metrics[f"eval/{name}/{key}"] = value
        accuracy = metrics[f"eval/{name}/accuracy"]
        half_width = 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(data))  # of a 95 % interval
        line += f"  {name} {accuracy:.3f} ± {half_width:.3f}"
    print0(f"step {step}, accuracy:{line}")
    return metrics


if __name__ == "__main__":
    args = parse_args()
    device = setup()

    # data and model
    tokenizer = load_tokenizer(args.model)
    args.max_length = args.max_length or default_max_length(args.model)
    train = tokenize(load_rows(args.data), args.data, tokenizer, args.max_length)
    sets = load_sets(args.eval_data, tokenizer, args.max_length)

    # the strength of each pair; a pair that the voters could not use has none
    if STRENGTH not in train.column_names:
        fatal(f"--data {args.data} has no column '{STRENGTH}': use what vote_strength.py writes")
    try:
        strengths = np.array(train[STRENGTH][:], float)
    except (TypeError, ValueError) as error:
        fatal(f"--data {args.data}: column '{STRENGTH}': {error}")
    has_strength = np.isfinite(strengths)
    train = train.select(np.flatnonzero(has_strength))
    strengths = strengths[has_strength]

    # which pairs to train on, and how
    kept = select_rows(strengths, args.percentiles, args.drop)
    if len(kept) == 0:
        fatal("no row is left to train on: none has a strength, or see --percentiles and --drop")
    train = train.select(kept)
    swap, margins, targets = make_targets(
        strengths[kept], args.flip, args.margin, args.label_smoothing, args.smooth_on,
        args.soft_targets)
    print0(f"{len(has_strength):,} pairs, {sum(~has_strength):,} without strength; kept: "
           f"{len(kept):,}, flipped: {swap.sum():,}; mean margin {margins.mean():.3f}, "
           f"mean target {targets.mean():.3f}")
    swap = torch.tensor(swap, device=device)
    margins = torch.tensor(margins, device=device, dtype=torch.float32)
    targets = torch.tensor(targets, device=device, dtype=torch.float32)
    model = load_reward_model(args.model, tokenizer, device, args)

    # UNSTATED: the paper gives the learning rate alone. Optimizer and clipping are as in the
    # authors' released trainer.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0,
        fused=device.type == "cuda")
    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    steps = math.ceil(steps_per_epoch * args.epochs)
    warmup = max(1, round(steps * args.warmup_ratio))

    # a new run, or the one to resume
    start = open_run(args, [args.model, args.data])
    if start:
        load_checkpoint(args.output_dir, model, optimizer, start)

    bar = tqdm(range(start, steps), "training", steps, initial=start, mininterval=1,
               disable=RANK > 0)
    for step in bar:
        began = time.time()
        done = step + 1

        # UNSTATED: the schedule. This is the one that the paper gives for SFT: the learning rate
        # rises linearly to its peak, then falls to 0.
        lr = args.lr * min(done / warmup, (steps - step) / max(1, steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # the gradient of the denoised loss, which is logged as train/objective; train/loss is Eq. 2
        # for the pairs as flipped, and so are the other metrics
        index = batch_indices(len(train), args.batch_size, args.seed, step)
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        objective = 0.0
        for batch in micro_batches(train, index, args.micro_batch_tokens, model):
            rewards = model(batch)  # (B, 2), chosen first
            rewards = torch.where(swap[batch.index, None], rewards.flip(1), rewards)
            losses = denoised_loss(rewards, margins[batch.index], targets[batch.index])
            loss = losses.sum() / len(index)
            loss.backward()
            objective += loss.detach()
            sums += metric_sums(rewards.detach())

        # means over all ranks, whose gradients FSDP has summed during backward
        dist.all_reduce(sums)
        dist.all_reduce(objective)
        means = (sums / len(index)).tolist()
        metrics = {f"train/{key}": value for key, value in zip(METRICS, means)}
        metrics["train/objective"] = objective.item()

        # the optimizer step
        grad_norm = clip_gradients(model, args.max_grad_norm)
        if not math.isfinite(metrics["train/loss"] + grad_norm):
            fatal(f"step {done}: the loss or its gradient is not finite: lower the learning rate")
        optimizer.step()
        optimizer.zero_grad()
        metrics["train/grad_norm"] = grad_norm
        metrics["train/lr"] = lr
        metrics["train/pairs_per_sec"] = len(index) / (time.time() - began)

        # evaluate, log and save
        if done == steps or args.eval_every and done % args.eval_every == 0:
            metrics.update(evaluate(model, sets, args.micro_batch_tokens, done))
        log(args.output_dir, done, metrics)
        bar.set_postfix(loss=means[0], accuracy=means[1], refresh=False)
        if args.save_every and done % args.save_every == 0 and done < steps:
            save_checkpoint(args.output_dir, model, optimizer, done)

    save_model(f"{args.output_dir}/model", model, tokenizer)
