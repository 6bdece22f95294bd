"""Reward modelling, the plain way: a Bradley-Terry model of human preferences.

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), section 2.1.

Annotators compare two responses y_c (chosen) and y_r (rejected) to a prompt x. Bradley and Terry
assume that the probability of a preference depends only on the difference of two scores (Eq. 1).
The reward model r is a language model with one linear layer on its last hidden state. It is trained
by maximum likelihood (Eq. 2):

    P(y_c > y_r | x) = sigmoid(r(x, y_c) - r(x, y_r))
    L                = -E log sigmoid(r(x, y_c) - r(x, y_r))

    torchrun baseline_rm.py                                    a toy world, 20 seconds on a CPU
    torchrun --nproc_per_node 8 baseline_rm.py --model meta-llama/Llama-2-7b-hf

The second command has the paper's data and learning rate, but not its split, and starts from Llama
2 instead of the paper's SFT model. Watch eval/<set>/accuracy. Human annotators agree with each
other on 60 to 75 % of the pairs, and a good reward model agrees with them about as often.
"""

import argparse
import math
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm.auto import tqdm

from common import (
    RANK, TOY_DATA, HelpFormatter, batch_indices, clip_gradients, compute_rewards,
    default_max_length, fatal, in_range, is_toy, load_checkpoint, load_reward_model, load_rows,
    load_sets, load_tokenizer, log, micro_batches, named_source, open_run, print0, save_checkpoint,
    save_model, setup, tokenize)

TOY_SETTINGS = {"epochs": 3.0, "lr": 5e-4, "max_length": 64, "eval_every": 100, "save_every": 100}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False,
        epilog=f"without --model: the toy data, and the defaults {TOY_SETTINGS}")
    parser.error = fatal  # one line, without the usage
    add = parser.add_argument
    add("--model",
        help="language model or reward model: folder or hub id; by default that of the toy world")
    # DEVIATION: the paper mixes the splits of hh-rlhf and holds out a tenth. Here they are kept.
    add("--data", default="Anthropic/hh-rlhf",
        help=".jsonl, .json (also .gz), .parquet or hub id[[:config]:split]")
    add("--eval-data", nargs="*", type=named_source, metavar="NAME=SOURCE",
        default=[("test", "Anthropic/hh-rlhf:test")], help="named sets to evaluate on")
    add("--output-dir", default="runs/baseline_rm",
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


def preference_loss(rewards):
    """Eq. 2 for each comparison: rewards (B, 2), chosen first -> (B,).

    logsigmoid, because log(sigmoid) underflows."""
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1])


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

        # The gradient of the loss, one micro-batch at a time. With most models, a row of a batch is
        #     prompt | chosen | rejected
        # where chosen and rejected cannot see each other. model(batch) takes the hidden state at
        # the last token of each response, usually EOS, and applies one linear layer to it
        # (RewardModel in common.py).
        index = batch_indices(len(train), args.batch_size, args.seed, step)
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        for batch in micro_batches(train, index, args.micro_batch_tokens, model):
            rewards = model(batch)  # (B, 2), chosen first
            loss = preference_loss(rewards).sum() / len(index)
            loss.backward()
            sums += metric_sums(rewards.detach())

        # means over all ranks, whose gradients FSDP has summed during backward
        dist.all_reduce(sums)
        means = (sums / len(index)).tolist()
        metrics = {f"train/{key}": value for key, value in zip(METRICS, means)}

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
