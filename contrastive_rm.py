r"""Reward modelling with a contrastive loss that pulls the features of chosen and rejected apart.

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), section 3.1.

The features f(x, y), the hidden states that the reward head reads, overlap for chosen and rejected
responses. The contrastive loss compares N' = 2 N samples h from a batch of N comparisons. --on says
which:

    pairs          h = f(x, y_c) and f(x, y_r)
    differences    h = f(x, y_c) - f(x, y_r) and f(x, y_r) - f(x, y_c)

Two forward passes with different dropout masks give two views h_s and h_t of each sample. SimCSE
(Eq. 9) treats the two views of a sample as a positive pair and all other samples as negatives. SwAV
(Eqs. 7 and 8) assigns each view softly to K prototypes c_k, and predicts this assignment, the code
q, from the other view:

    SimCSE    l_i = -log  exp(cos(h_s_i, h_t_i) / tau)  /  sum_j exp(cos(h_s_i, h_t_j) / tau)
    SwAV      l_i = -sum_k q_s_k log p_t_k - sum_k q_t_k log p_s_k
              p_t = softmax_k(cos(h_t_i, c_k) / tau)
    L         = L_rm + beta mean_i l_i,      L_rm: Eq. 2, mean over the two views

    torchrun contrastive_rm.py                      SimCSE on pairs in a toy world, half a minute
    torchrun --nproc_per_node 8 contrastive_rm.py --model meta-llama/Llama-2-7b-hf \
        --method swav --on differences

The samples are those of the whole batch, over all ranks and micro-batches. A first pass without
gradients computes the features, and from them the gradient of the contrastive loss at each feature.
A second pass computes the features again, micro-batch by micro-batch, and passes this gradient on
to the weights (gradient caching, arXiv 2101.06983).

Watch train/contrastive, and the overlap of features in eval.py (Fig. 11). In the toy world all but
SwAV on pairs cost a pretrained model accuracy.
"""

import argparse
import math
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from common import (
    RANK, TOY_DATA, HelpFormatter, batch_indices, clip_gradients, compute_rewards,
    default_max_length, fatal, in_range, is_toy, load_checkpoint, load_reward_model, load_rows,
    load_sets, load_tokenizer, log, micro_batches, named_source, open_run, print0, save_checkpoint,
    save_model, setup, tokenize)

TOY_SETTINGS = {
    "epochs": 3.0, "lr": 5e-4, "max_length": 64, "eval_every": 100, "save_every": 100,
    "batch_size": 32}
SWAV_SETTINGS = {  # the defaults with --method swav, by --on
    "pairs": {"beta": 0.1, "temperature": 0.1, "num_prototypes": 50},
    "differences": {"beta": 0.5, "temperature": 0.1, "num_prototypes": 20}}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False,
        epilog=f"without --model: the toy data, and the defaults {TOY_SETTINGS}")
    parser.error = fatal  # one line, without the usage
    add = parser.add_argument
    # the method
    add("--method", choices=["simcse", "swav"], default="simcse", help="contrastive loss")
    add("--on", choices=["pairs", "differences"], default="pairs",
        help="samples that the contrastive loss compares")
    add("--beta", type=in_range(float, 0), default=1.0,
        help="weight of the contrastive loss; with swav the default is 0.1 on pairs and 0.5 on "
        "differences; 0: none, which with --dropout 0 is baseline_rm.py")
    add("--dropout", type=in_range(float, 0, 0.99), default=0.05,
        help="dropout rate of the two views, wherever the model has dropout; 0: one view")
    # UNSTATED: the temperatures. They are those of the two methods' own code.
    add("--temperature", type=in_range(float, 1e-4), default=0.05,
        help="tau; default with swav: 0.1")
    add("--num-prototypes", type=in_range(int, 2), default=50,
        help="K of swav; default on differences: 20")

    # as in baseline_rm.py, but with batches of 16
    add("--model",
        help="language model or reward model: folder or hub id; by default that of the toy world")
    # DEVIATION: the paper mixes the splits of hh-rlhf and holds out a tenth. Here they are kept.
    add("--data", default="Anthropic/hh-rlhf",
        help=".jsonl, .json (also .gz), .parquet or hub id[[:config]:split]")
    add("--eval-data", nargs="*", type=named_source, metavar="NAME=SOURCE",
        default=[("test", "Anthropic/hh-rlhf:test")], help="named sets to evaluate on")
    add("--output-dir", default="runs/contrastive_rm",
        help="folder for model/, metrics.jsonl, args.json and checkpoints")
    add("--seed", type=in_range(int, 0), default=0,
        help="random seed for the reward head, the data order, dropout and prototypes")
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
        help="tokens per forward pass, limits memory; also changes the dropout masks")
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
    # new defaults, which flags on the command line override
    known = parser.parse_known_args()[0]
    if is_toy(known.model):
        parser.set_defaults(**TOY_DATA | TOY_SETTINGS)
        print0(f"toy world, with the defaults {TOY_SETTINGS}")
    if known.method == "swav":
        parser.set_defaults(**SWAV_SETTINGS[known.on])
    args = parser.parse_args()
    if args.beta > 0 and args.dropout == 0:
        fatal("--dropout 0 makes the two views of a sample equal: --beta must be 0 as well")
    return args


def forward_views(model, batches, num_views, seed, step):
    """Yield view, batch, rewards (B, 2), features (B, 2, hidden) for every view of every batch.

    The dropout masks are a function of seed, step, view, micro-batch and rank, so that a second
    call gives the same features."""
    for view in range(num_views):
        for i, batch in enumerate(batches):
            rng = np.random.default_rng((seed, step, view, i, RANK))
            torch.manual_seed(int(rng.integers(2**62)))
            rewards, features = model(batch, with_features=True)
            yield view, batch, rewards, features


def stack_samples(features, on):
    """Features (2, N, 2, hidden) of the two views, chosen first -> samples (2, 2 N, hidden)."""
    chosen, rejected = features.unbind(2)
    if on == "pairs":
        return torch.cat([chosen, rejected], 1)
    return torch.cat([chosen - rejected, rejected - chosen], 1)


# UNSTATED: what is compared. Here the cosines of what the reward head reads, without a projection,
# and negatives of all ranks. SwAV's prototypes are normalised in the forward pass.
def simcse_loss(h_s, h_t, temperature):
    """Eq. 9, mean over the samples: h_s, h_t (N', hidden) -> scalar."""
    cosines = F.normalize(h_s, dim=-1) @ F.normalize(h_t, dim=-1).T  # (N', N')
    positives = torch.arange(len(h_s), device=h_s.device)
    return F.cross_entropy(cosines / temperature, positives)


@torch.no_grad()
def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Scores (N', K) of samples with prototypes -> codes q (N', K).

    Each row sums to 1 and each column to about N' / K, so that no prototype takes everything.
    Computed as logarithms, which do not overflow."""
    # UNSTATED: entropy regularisation and iterations. They are those of SwAV's own code.
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


def swav_loss(h_s, h_t, prototypes, temperature):
    """Eqs. 7 and 8, mean over samples: h_s, h_t (N', hidden), prototypes (K, hidden) -> scalar."""
    prototypes = F.normalize(prototypes, dim=-1)
    scores_s = F.normalize(h_s, dim=-1) @ prototypes.T  # (N', K)
    scores_t = F.normalize(h_t, dim=-1) @ prototypes.T
    q_s = sinkhorn(scores_s)
    q_t = sinkhorn(scores_t)
    log_p_s = F.log_softmax(scores_s / temperature, -1)
    log_p_t = F.log_softmax(scores_t / temperature, -1)
    return -(q_s * log_p_t + q_t * log_p_s).sum(-1).mean()


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
    # UNSTATED: the place of dropout. The paper gives the rate alone. Here it is every place where
    # the model's config has dropout, in Llama the attention weights. After every layer, dropout
    # kept SmolLM2, which has 30 layers, from learning.
    # DEVIATION: the prompt is computed once, so chosen and rejected share its tokens' dropout masks
    # in each view.
    model = load_reward_model(args.model, tokenizer, device, args, dropout=args.dropout)
    num_views = 2 if args.dropout > 0 else 1
    hidden_size = model.hf_model.score.in_features

    # UNSTATED: the prototypes learn from the first step on, and their gradient is not clipped.
    # SwAV's own code freezes them for 313 steps. Every rank has a copy, and equal gradients keep
    # the copies equal. Checkpoints hold the model and the prototypes.
    modules = nn.ModuleDict({"model": model})
    if args.method == "swav":
        torch.manual_seed(args.seed)
        prototypes = nn.Linear(hidden_size, args.num_prototypes, bias=False).to(device)
        modules["prototypes"] = prototypes

    # UNSTATED: the paper gives the learning rate alone. Optimizer and clipping are as in the
    # authors' released trainer.
    optimizer = torch.optim.AdamW(
        [{"params": module.parameters()} for module in modules.values()],
        lr=args.lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0,
        fused=device.type == "cuda")
    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    steps = math.ceil(steps_per_epoch * args.epochs)
    warmup = max(1, round(steps * args.warmup_ratio))

    # a new run, or the one to resume
    start = open_run(args, [args.model, args.data])
    if start:
        load_checkpoint(args.output_dir, modules, optimizer, start)

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

        # the micro-batches of this step; batch.index counts from 0 to N - 1, as in all_features
        index = batch_indices(len(train), args.batch_size, args.seed, step)
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        rows = np.arange(len(index))
        batches = list(micro_batches(train.select(index), rows, args.micro_batch_tokens, model))

        # first pass: the contrastive loss of the whole batch, and its gradient at every feature
        if args.beta > 0:
            all_features = torch.zeros(2, len(index), 2, hidden_size, device=device)
            with torch.no_grad():
                views = forward_views(model, batches, num_views, args.seed, step)
                for view, batch, _, features in views:
                    all_features[view, batch.index] = features
            dist.all_reduce(all_features)  # every rank has filled in its own rows
            if step == start and torch.equal(all_features[0], all_features[1]):
                print0(f"warning: {args.model} has no dropout, so the two views are equal")
            all_features.requires_grad_()  # its .grad is what the second pass needs
            h_s, h_t = stack_samples(all_features, args.on)
            if args.method == "simcse":
                contrastive = simcse_loss(h_s, h_t, args.temperature)
            else:
                contrastive = swav_loss(h_s, h_t, prototypes.weight, args.temperature)
            (args.beta * contrastive).backward()

        # second pass: the gradient of both losses with respect to the weights. For the contrastive
        # loss it is that of sum(g * features), where g is the gradient from the first pass.
        for view, batch, rewards, features in forward_views(
                model, batches, num_views, args.seed, step):
            loss = preference_loss(rewards).sum() / len(index) / num_views
            if args.beta > 0:
                loss = loss + (all_features.grad[view, batch.index] * features).sum()
            loss.backward()
            sums += metric_sums(rewards.detach()) / num_views

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
        if args.beta > 0:
            metrics["train/contrastive"] = contrastive.item()
        metrics["train/grad_norm"] = grad_norm
        metrics["train/lr"] = lr
        metrics["train/pairs_per_sec"] = len(index) / (time.time() - began)

        # evaluate, log and save
        if done == steps or args.eval_every and done % args.eval_every == 0:
            metrics.update(evaluate(model, sets, args.micro_batch_tokens, done))
        log(args.output_dir, done, metrics)
        bar.set_postfix(loss=means[0], accuracy=means[1], refresh=False)
        if args.save_every and done % args.save_every == 0 and done < steps:
            save_checkpoint(args.output_dir, modules, optimizer, done)

    save_model(f"{args.output_dir}/model", model, tokenizer)
