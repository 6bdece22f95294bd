"""Reward modelling, the plain way: a Bradley-Terry model of human preferences.

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), section 2.1.

Annotators compare two responses y_c (chosen) and y_r (rejected) to a prompt x. Bradley and Terry assume that the
probability of a preference depends on the difference of two scores alone (Eq. 1). The reward model r, a language model
with one linear layer on its last hidden state, is trained by maximum likelihood (Eq. 2):

    P(y_c > y_r | x) = sigmoid(r(x, y_c) - r(x, y_r))
    L                = -E log sigmoid(r(x, y_c) - r(x, y_r))

    torchrun baseline_rm.py                                                         a toy world, 20 seconds on a CPU
    torchrun --nproc_per_node 8 baseline_rm.py --model meta-llama/Llama-2-7b-hf     the paper's setting

Watch eval/<set>/accuracy. Human annotators agree with each other on 60 to 75 % of the pairs, and a good reward model
agrees with them about as often.
"""

import argparse
import math
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm.auto import tqdm

from common import (
    RANK, HelpFormatter, batch_indices, clip_gradients, compute_rewards, fatal, in_range,
    load_checkpoint, load_reward_model, load_rows, load_sets, load_tokenizer, log, micro_batches,
    named_source, open_run, print0, save_checkpoint, save_model, setup, tokenize)

TOY_DEFAULTS = {  # replace those of the flags when --model is docs/toy/model
    "data": "docs/toy/train.jsonl", "epochs": 3.0, "lr": 5e-4, "max_length": 64, "eval_every": 100, "save_every": 100,
    "eval_data": [(name, f"docs/toy/{name}.jsonl") for name in ("id", "ood", "shifted", "noisy")]}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False, epilog=f"toy defaults: {TOY_DEFAULTS}")
    parser.error, add = fatal, parser.add_argument
    add("--model", default="docs/toy/model", help="language model or reward model: folder or hub id")
    # DEVIATION: the paper mixes the two splits of hh-rlhf and holds out a tenth; here the two splits are kept.
    add("--data", default="Anthropic/hh-rlhf", help=".jsonl, .json (also .gz), .parquet or hub id[[:config]:split]")
    add("--eval-data", nargs="*", type=named_source, default=[("test", "Anthropic/hh-rlhf:test")],
        metavar="NAME=SOURCE", help="named sets to evaluate on")
    add("--output-dir", default="runs/baseline_rm", help="folder for model/, metrics.jsonl, args.json and checkpoints")
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
    if parser.parse_known_args()[0].model == "docs/toy/model":
        parser.set_defaults(**TOY_DEFAULTS)
    return parser.parse_args()


def preference_loss(rewards):
    """Eq. 2 for each comparison: rewards (B, 2), chosen first -> (B,). logsigmoid, because log(sigmoid) underflows."""
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1])


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
        for batch in micro_batches(train, index, args.micro_batch_tokens, model):
            rewards = model(batch)  # (B, 2)
            loss = preference_loss(rewards).sum() / len(index)
            loss.backward()
            sums += metric_sums(rewards.detach())
        dist.all_reduce(sums)
        grad_norm = clip_gradients(model, args.max_grad_norm)
        metrics = {f"train/{key}": value for key, value in zip(METRICS, (sums / len(index)).tolist())}
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
