"""Reward modelling for a policy that moves: MetaRM, meant to tell the policy's new responses apart without labels.

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), section 3.2, and Alleviating
Shifted Distribution in Human Preference Alignment through Meta-Learning (arXiv 2405.00438).

As PPO shifts the policy, its responses y_1 ... y_k to a prompt come to look alike to the reward model. How well it
still tells them apart is measured without labels (Eq. 11; (k - 1) / 2k at equal rewards, always below (k - 1) / k):

    J(theta) = 2 / k^2  sum_{i<j} sigmoid( |r(x, y_i) - r(x, y_j)| )         averaged over a batch of the meta set

Every step first ascends J, then takes the gradient of the preference loss there and applies it to the weights from
before the ascent (Eqs. 12 to 14). To first order this gradient is grad L + eta H_L grad J:

    theta'   = theta + eta grad J(theta)
    theta   <- theta - alpha grad L(theta')                                  L: Eq. 2; through AdamW, as in the baseline

    torchrun meta_rm.py                                      the toy world and its SFT model's samples, 25 seconds
    python ppo_loop.py --model my-policy --iterations 0      samples a meta set from your own policy
    torchrun --nproc_per_node 8 meta_rm.py --model my-sft-model --meta-data runs/ppo_loop/samples.jsonl

Compare train/shift, the length of the ascent step, with train/update, the length of the AdamW step; and
eval/meta/difference, the mean of |r(x, y_i) - r(x, y_j)| on a held-out tenth, with that of a run with --eta 0.
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
    RANK, HelpFormatter, batch_indices, clip_gradients, compute_rewards, fatal, in_range,
    load_checkpoint, load_reward_model, load_rows, load_sets, load_tokenizer, log, micro_batches,
    named_source, open_run, print0, save_checkpoint, save_model, setup, tokenize)

TOY_DEFAULTS = {  # replace those of the flags when --model is docs/toy/model
    "data": "docs/toy/train.jsonl", "epochs": 3.0, "lr": 5e-4, "max_length": 64, "eval_every": 100, "save_every": 100,
    "batch_size": 32, "eta": 1e-2, "meta_data": "docs/toy/meta.jsonl",
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
    add("--output-dir", default="runs/meta_rm", help="folder for model/, metrics.jsonl, args.json and checkpoints")
    add("--seed", type=in_range(int, 0), default=0, help="random seed for the reward head and the data order")
    add("--epochs", type=in_range(float, 0.001), default=1.0, help="passes over the data")
    add("--batch-size", type=in_range(int, 1), default=16, help="comparisons per optimizer step, over all ranks")
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
    add("--eta", type=in_range(float, 0), default=5e-6, help="step size of the ascent on J; 0: none")
    add("--ascent", choices=["plain", "normalized"], default="plain", help="step along the gradient or its unit vector")
    # UNSTATED: --update alternate is another way to read the papers' words; Eq. 14 restores.
    add("--update", choices=["restore", "alternate"], default="restore", help="apply the gradient to theta or theta'")
    add("--meta-data", default="runs/ppo_loop/samples.jsonl", help="rows of prompt and k responses of the policy")
    add("--meta-batch-size", type=in_range(int, 1), default=16, help="prompts per optimizer step, over all ranks")
    if parser.parse_known_args()[0].model == "docs/toy/model":
        parser.set_defaults(**TOY_DEFAULTS)
    return parser.parse_args()


def difference(rewards):
    """J of Eq. 11 for each prompt: rewards (B, k) -> (B,). Where rewards are equal, its gradient is 0."""
    k = rewards.size(1)
    i, j = torch.triu_indices(k, k, 1, device=rewards.device)
    return 2 / k**2 * torch.sigmoid((rewards[:, i] - rewards[:, j]).abs()).sum(1)


def global_norm(tensors):
    """Euclidean norm of all tensors together, over the shards of all ranks."""
    squares = sum((x.to_local() if isinstance(x, DTensor) else x).double().pow(2).sum() for x in tensors)
    dist.all_reduce(squares)
    return math.sqrt(squares.item())


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


def evaluate_meta(model, held_out, micro_tokens):
    """J and the mean of |r_i - r_j| over the pairs of responses to a prompt, on held-out meta data (Fig. 16)."""
    rewards = compute_rewards(model, held_out, micro_tokens)
    i, j = torch.triu_indices(rewards.size(1), rewards.size(1), 1)
    gaps = (rewards[:, i] - rewards[:, j]).abs()
    print0(f"mean |reward difference| on held-out meta data: {gaps.mean():.3f}")
    return {"eval/meta/J": difference(rewards).mean().item(), "eval/meta/difference": gaps.mean().item()}


if __name__ == "__main__":
    args = parse_args()
    device = setup()

    # data and model
    tokenizer = load_tokenizer(args.model)
    train = tokenize(load_rows(args.data), args.data, tokenizer, args.max_length)
    sets = load_sets(args.eval_data, tokenizer, args.max_length)
    meta = tokenize(load_rows(args.meta_data), args.meta_data, tokenizer, args.max_length, k=None)
    if len(meta) < 2:
        fatal(f"--meta-data {args.meta_data}: needs at least two rows")
    split = math.floor(0.9 * len(meta))
    meta, held_out = meta.select(range(split)), meta.select(range(split, len(meta)))
    model = load_reward_model(args.model, tokenizer, device, args)

    # UNSTATED: the paper gives the learning rate alone. Optimizer and clipping are as in the authors' released trainer.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0,
                                  fused=device.type == "cuda")
    per_epoch = math.ceil(len(train) / args.batch_size)
    steps = math.ceil(per_epoch * args.epochs)
    warmup = max(1, round(steps * args.warmup_ratio))
    start = open_run(args, [args.model, args.data, args.meta_data])
    if start:
        load_checkpoint(args.output_dir, model, optimizer, start)

    bar = tqdm(range(start, steps), "training", steps, initial=start, mininterval=1, disable=RANK > 0)
    for step in bar:
        began = time.time()
        # UNSTATED: the schedule. This is the one that the paper gives for SFT: warm-up, then linearly to 0.
        lr = args.lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = lr
        # UNSTATED: whether eta follows the schedule, too. Here it is constant.
        if args.eta:  # ascend J on a batch of the meta set, Eq. 12
            index = batch_indices(len(meta), args.meta_batch_size, args.seed, step)
            J = torch.zeros(1, device=device)
            for batch in micro_batches(meta, index, args.micro_batch_tokens, model):
                objective = difference(model(batch)).sum() / len(index)
                objective.backward()
                J += objective.detach()
            dist.all_reduce(J)
            weights = [w for w in model.parameters() if w.grad is not None]
            before = [w.detach().clone() for w in weights]
            slope = global_norm([w.grad for w in weights])
            rate = args.eta / slope if args.ascent == "normalized" and slope else args.eta
            with torch.no_grad():
                for w in weights:
                    w.add_(w.grad, alpha=rate)
            optimizer.zero_grad()
            # FSDP gathers these weights in bf16, where a small step is rounded away: measure what is left of it.
            dtypes = [torch.float32 if w is model.hf_model.score.weight else model.dtype for w in weights]
            shift = global_norm([w.detach().to(x) - old.to(x) for w, old, x in zip(weights, before, dtypes)])
            if step == start and shift < 0.5 * rate * slope:
                print0(f"{args.dtype} leaves {shift / (rate * slope):.0%} of the ascent: use float32 or a larger --eta")

        # the gradient of the preference loss at theta', Eq. 13
        index = batch_indices(len(train), args.batch_size, args.seed, step)
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        for batch in micro_batches(train, index, args.micro_batch_tokens, model):
            rewards = model(batch)  # (B, 2)
            loss = preference_loss(rewards).sum() / len(index)
            loss.backward()
            sums += metric_sums(rewards.detach())
        dist.all_reduce(sums)
        if args.eta and args.update == "restore":  # Eq. 14: the step starts from theta, bit for bit
            with torch.no_grad():
                for w, old in zip(weights, before):
                    w.copy_(old)
        grad_norm = clip_gradients(model, args.max_grad_norm)
        metrics = {f"train/{key}": value for key, value in zip(METRICS, (sums / len(index)).tolist())}
        if not math.isfinite(metrics["train/loss"] + grad_norm):
            fatal(f"step {step + 1}: loss {metrics['train/loss']}, gradient norm {grad_norm}: lower the learning rate")
        optimizer.step()
        optimizer.zero_grad()
        if args.eta:
            update = global_norm([w.detach() - old for w, old in zip(weights, before)])
            metrics.update({"train/J": J.item(), "train/shift": shift, "train/update": update})

        speed = len(index) / (time.time() - began)
        metrics.update({"train/grad_norm": grad_norm, "train/lr": lr, "train/pairs_per_sec": speed})
        if step + 1 == steps or args.eval_every and (step + 1) % args.eval_every == 0:
            metrics.update(evaluate(model, sets, args.micro_batch_tokens))
            metrics.update(evaluate_meta(model, held_out, args.micro_batch_tokens))
        log(args.output_dir, step + 1, metrics)
        bar.set_postfix(loss=metrics["train/loss"], accuracy=metrics["train/accuracy"], refresh=False)
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < steps:
            save_checkpoint(args.output_dir, model, optimizer, step + 1)

    save_model(f"{args.output_dir}/model", model, tokenizer)
