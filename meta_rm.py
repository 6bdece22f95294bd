r"""Reward modelling for a policy that moves: MetaRM.

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), section 3.2,
and MetaRM: Shifted Distributions Alignment via Meta-Learning (arXiv 2405.00438).

As PPO shifts the policy, the reward model sees responses y_1 ... y_k unlike those it was trained
on, and tells them apart less well. J measures, without labels, how far apart their rewards are
(Eq. 11). It ranges from (k - 1) / (2k), where all are equal, to (k - 1) / k:

    J(theta) = 2 / k^2  sum_{i<j} sigmoid( |r(x, y_i) - r(x, y_j)| )      mean over a meta batch

Every step first ascends J. It takes the gradient of the preference loss L (Eq. 2) there, and
applies it to the weights from before the ascent (Eqs. 12 to 14). To first order this gradient is
grad L + eta H_L grad J:

    theta'   = theta + eta grad J(theta)
    theta   <- theta - alpha grad L(theta')             the step is AdamW's, as in baseline_rm.py

    torchrun meta_rm.py                                 the toy world, 25 seconds on a CPU
    python ppo_loop.py --model my-policy --iterations 0
    torchrun --nproc_per_node 8 meta_rm.py --model my-sft-model \
        --meta-data runs/ppo_loop/samples.jsonl

The second command samples a meta set from your own policy. Compare train/ascent, the length of the
ascent, with train/update, the length of the optimizer's step (with --update alternate, of both
together). eval/meta/difference is the mean of |r(x, y_i) - r(x, y_j)| on a held-out tenth of the
meta set. Compare it with a run with --eta 0.

What it costs: each step takes about twice as long, and needs a copy of the weights. In the toy
world and on the real text that we tried, it did not improve accuracy (docs/results.md).

In a training loop of your own, once per optimizer step and before any gradient accumulation:

    difference_loss(rewards_of_meta_batch).mean().backward()        # rewards (B, k)
    params = [p for p in model.parameters() if p.grad is not None]
    saved = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p in params:
            p.add_(p.grad, alpha=eta)
    model.zero_grad()
    ...                                                             # the usual forward and backward
    with torch.no_grad():
        for p, old in zip(params, saved):
            p.copy_(old)
    ...                                                             # the usual clipping and step

In a TRL callback, ascend in on_step_begin and restore in on_pre_optimizer_step. Under DDP, average
p.grad over the ranks first, unless the forward pass went through the DDP wrapper. It does not work
with ZeRO or FSDP1, which keep flattened weights. Keep the weights in fp32, since bf16 rounds a
small ascent away. A good eta depends on the size of the head's weights: here they have a standard
deviation of 1/sqrt(hidden + 1), in transformers 0.02.
"""

import argparse
import math
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from common import (
    RANK, TOY, TOY_DATA, HelpFormatter, batch_indices, clip_gradients, compute_rewards,
    default_max_length, fatal, in_range, is_toy, load_checkpoint, load_reward_model, load_rows,
    load_sets, load_tokenizer, log, micro_batches, named_source, open_run, print0, save_checkpoint,
    save_model, setup, tokenize)

TOY_SETTINGS = {
    "epochs": 3.0, "lr": 5e-4, "max_length": 64, "eval_every": 100, "save_every": 100,
    "batch_size": 32, "eta": 1e-2, "meta_data": f"{TOY}/meta.jsonl"}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False,
        epilog=f"without --model: the toy data, and the defaults {TOY_SETTINGS}")
    parser.error = fatal  # one line, without the usage
    add = parser.add_argument
    # the method
    add("--eta", type=float, default=5e-6,
        help="step size of the ascent on J; 0: no ascent, as in baseline_rm.py")
    add("--ascent", choices=["plain", "normalized"], default="plain",
        help="ascend along the gradient of J, or along its unit vector")
    # UNSTATED: whether the weights are restored. Eq. 14 does it, but other words of the papers can
    # be read as alternating between two kinds of steps.
    add("--update", choices=["restore", "alternate"], default="restore",
        help="restore: step from theta, as in Eq. 14; alternate: step from theta'")
    add("--meta-data", default="runs/ppo_loop/samples.jsonl",
        help="rows of a prompt and k responses of the policy; the last tenth is held out")
    add("--meta-batch-size", type=in_range(int, 1), default=16,
        help="prompts of the meta set per optimizer step, over all ranks")

    # as in baseline_rm.py, but with batches of 16
    add("--model",
        help="language model or reward model: folder or hub id; by default that of the toy world")
    # the splits of hh-rlhf, as in the MetaRM paper
    add("--data", default="Anthropic/hh-rlhf",
        help=".jsonl, .json (also .gz), .parquet or hub id[[:config]:split]")
    add("--eval-data", nargs="*", type=named_source, metavar="NAME=SOURCE",
        default=[("test", "Anthropic/hh-rlhf:test")], help="named sets to evaluate on")
    add("--output-dir", default="runs/meta_rm",
        help="folder for model/, metrics.jsonl, args.json and checkpoints")
    add("--seed", type=in_range(int, 0), default=0,
        help="random seed for the reward head and the data order")
    add("--epochs", type=in_range(float, 0.001), default=1.0, help="passes over the data")
    add("--batch-size", type=in_range(int, 1), default=16,
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


def difference_loss(rewards):
    """J of Eq. 11 for each prompt: rewards (B, k) -> (B,). It is maximised, although the papers
    call it a loss.

    A pair of equal rewards has no gradient."""
    k = rewards.size(1)
    i, j = torch.triu_indices(k, k, 1, device=rewards.device)
    return 2 / k**2 * torch.sigmoid((rewards[:, i] - rewards[:, j]).abs()).sum(1)


def global_norm(tensors):
    """Euclidean norm of all tensors together, over the shards of all ranks."""
    squares = 0
    for x in tensors:
        if isinstance(x, DTensor):
            x = x.to_local()
        squares = squares + x.double().pow(2).sum()
    dist.all_reduce(squares)
    return math.sqrt(squares.item())


def ascent_length(model, params, saved):
    """The length of the ascent from `saved` to `params` as the forward pass sees it.

    FSDP gathers all weights but the head in `model.dtype`. bf16 may round a small step away."""
    steps = []
    for p, old in zip(params, saved):
        dtype = torch.float32 if p is model.hf_model.score.weight else model.dtype
        steps.append(p.detach().to(dtype) - old.to(dtype))
    return global_norm(steps)


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


def evaluate_meta(model, held_out, micro_tokens):
    """J and the mean of |r_i - r_j| over pairs of responses, on held-out meta data (Fig. 16)."""
    rewards = compute_rewards(model, held_out, micro_tokens)
    i, j = torch.triu_indices(rewards.size(1), rewards.size(1), 1)
    gaps = (rewards[:, i] - rewards[:, j]).abs()
    print0(f"mean |reward difference| on held-out meta data: {gaps.mean():.3f}")
    return {"eval/meta/J": difference_loss(rewards).mean().item(),
            "eval/meta/difference": gaps.mean().item()}


if __name__ == "__main__":
    args = parse_args()
    device = setup()

    # data and model
    tokenizer = load_tokenizer(args.model)
    args.max_length = args.max_length or default_max_length(args.model)
    train = tokenize(load_rows(args.data), args.data, tokenizer, args.max_length)
    sets = load_sets(args.eval_data, tokenizer, args.max_length)
    meta = tokenize(
        load_rows(args.meta_data), args.meta_data, tokenizer, args.max_length, k=None)
    if len(meta) < 2:
        fatal(f"--meta-data {args.meta_data}: needs at least two rows")
    split = len(meta) * 9 // 10
    held_out = meta.skip(split)
    meta = meta.take(split)
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
    start = open_run(args, [args.model, args.data, args.meta_data])
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

        # Eq. 12: ascend J on a batch of the meta set
        # UNSTATED: whether eta follows the schedule, too. Here it is constant.
        if args.eta:
            meta_index = batch_indices(len(meta), args.meta_batch_size, args.seed, step)
            J = 0.0
            for batch in micro_batches(meta, meta_index, args.micro_batch_tokens, model):
                objective = difference_loss(model(batch)).sum() / len(meta_index)
                objective.backward()
                J += objective.detach()
            dist.all_reduce(J)

            params = [p for p in model.parameters() if p.grad is not None]
            saved = [p.detach().clone() for p in params]
            meta_grad_norm = global_norm([p.grad for p in params])
            step_size = args.eta
            if args.ascent == "normalized" and meta_grad_norm:
                step_size = args.eta / meta_grad_norm
            with torch.no_grad():
                for p in params:
                    p.add_(p.grad, alpha=step_size)
            optimizer.zero_grad()
            ascent = ascent_length(model, params, saved)

        # Eq. 13: the gradient of the preference loss at theta', as in baseline_rm.py
        index = batch_indices(len(train), args.batch_size, args.seed, step)
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        for batch in micro_batches(train, index, args.micro_batch_tokens, model):
            rewards = model(batch)  # (B, 2), chosen first
            loss = preference_loss(rewards).sum() / len(index)
            loss.backward()
            sums += metric_sums(rewards.detach())

        # Eq. 14: the optimizer step starts from theta, bit for bit
        if args.eta and args.update == "restore":
            with torch.no_grad():
                for p, old in zip(params, saved):
                    p.copy_(old)

        # means over all ranks, whose gradients FSDP has summed during backward
        dist.all_reduce(sums)
        means = (sums / len(index)).tolist()
        metrics = {f"train/{key}": value for key, value in zip(METRICS, means)}

        # the optimizer step
        grad_norm = clip_gradients(model, args.max_grad_norm)
        if not math.isfinite(metrics["train/loss"] + grad_norm):
            fatal(f"step {done}: the loss or its gradient is not finite: lower --lr or --eta")
        optimizer.step()
        optimizer.zero_grad()
        if args.eta:
            update = global_norm([p.detach() - old for p, old in zip(params, saved)])
            metrics.update({"train/J": J.item(), "train/ascent": ascent, "train/update": update})
            # less than half of its length before rounding
            if step == start and ascent < 0.5 * step_size * meta_grad_norm:
                print0(f"{args.dtype} rounds most of the ascent away: raise --eta or use float32")
        metrics["train/grad_norm"] = grad_norm
        metrics["train/lr"] = lr
        metrics["train/pairs_per_sec"] = len(index) / (time.time() - began)

        # evaluate, log and save
        if done == steps or args.eval_every and done % args.eval_every == 0:
            metrics.update(evaluate(model, sets, args.micro_batch_tokens, done))
            metrics.update(evaluate_meta(model, held_out, args.micro_batch_tokens))
        log(args.output_dir, done, metrics)
        bar.set_postfix(loss=means[0], accuracy=means[1], refresh=False)
        if args.save_every and done % args.save_every == 0 and done < steps:
            save_checkpoint(args.output_dir, model, optimizer, done)

    save_model(f"{args.output_dir}/model", model, tokenizer)
