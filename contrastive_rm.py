"""Reward modelling with a contrastive loss that pulls the features of chosen and rejected responses apart.

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), section 3.1.

The features f(x, y), the hidden states that the reward head reads, overlap for chosen and rejected responses. The
contrastive loss compares N' = 2 N samples h from a batch of N comparisons; --on says which:

    pairs          h = f(x, y_c) and f(x, y_r)
    differences    h = f(x, y_c) - f(x, y_r) and f(x, y_r) - f(x, y_c)

Two forward passes with different dropout masks give two views h_s and h_t of each sample. SimCSE (Eq. 9) finds the h_t
that belongs to an h_s among those of all samples. SwAV (Eqs. 7 and 8) assigns each view softly to K prototypes c_k, and
predicts this assignment, the code q, from the other view:

    SimCSE    l_i = -log  exp(cos(h_s_i, h_t_i) / tau)  /  sum_j exp(cos(h_s_i, h_t_j) / tau)
    SwAV      l_i = -sum_k q_s_k log p_t_k - sum_k q_t_k log p_s_k,      p_t = softmax_k(cos(h_t_i, c_k) / tau)
    L         = L_rm + beta mean_i l_i,      L_rm: Eq. 2, mean over the two views

    torchrun contrastive_rm.py                                  a toy world, half a minute on a CPU: SimCSE on pairs
    torchrun --nproc_per_node 8 contrastive_rm.py --model meta-llama/Llama-2-7b-hf --method swav --on differences

The samples are those of the whole batch, over all ranks and micro-batches. A first pass without gradients computes the
features and the gradient of the contrastive loss at each. A second pass recomputes the features, micro-batch by
micro-batch, and passes this gradient on to the weights (gradient caching, arXiv 2101.06983).

Watch train/contrastive, and the overlap in eval.py (Fig. 11). In the toy world all but SwAV on pairs cost accuracy.
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
    RANK, HelpFormatter, batch_indices, clip_gradients, compute_rewards, decoder_layers, fatal,
    in_range, load_checkpoint, load_reward_model, load_rows, load_sets, load_tokenizer, log,
    micro_batches, named_source, open_run, print0, save_checkpoint, save_model, setup, tokenize)

TOY_DEFAULTS = {  # replace those of the flags when --model is docs/toy/model
    "data": "docs/toy/train.jsonl", "epochs": 3.0, "batch_size": 32, "lr": 5e-4, "max_length": 64, "eval_every": 100,
    "save_every": 100, "eval_data": [(name, f"docs/toy/{name}.jsonl") for name in ("id", "ood", "shifted", "noisy")]}
SWAV_DEFAULTS = {  # replace those of the flags when --method is swav
    "pairs": {"beta": 0.1, "temperature": 0.1, "num_prototypes": 50},
    "differences": {"beta": 0.5, "temperature": 0.1, "num_prototypes": 20}}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False, epilog=f"toy defaults: {TOY_DEFAULTS}")
    parser.error, add = fatal, parser.add_argument
    add("--model", default="docs/toy/model", help="language model or reward model: folder or hub id")
    # DEVIATION: the paper mixes the two splits of hh-rlhf and holds out a tenth; here the two splits are kept.
    add("--data", default="Anthropic/hh-rlhf", help=".jsonl, .json (also .gz), .parquet or hub id[[:config]:split]")
    add("--eval-data", nargs="*", type=named_source, default=[("test", "Anthropic/hh-rlhf:test")],
        metavar="NAME=SOURCE", help="named sets to evaluate on")
    add("--output-dir", default="runs/contrastive_rm", help="folder for model/, metrics.jsonl, args.json and "
        "checkpoints")
    add("--seed", type=in_range(int, 0), default=0, help="random seed of head, data order, dropout, prototypes")
    add("--epochs", type=in_range(float, 0.001), default=1.0, help="passes over the data")
    add("--batch-size", type=in_range(int, 1), default=16, help="comparisons per optimizer step, over all ranks")
    add("--lr", type=in_range(float, 0), default=5e-6, help="peak learning rate of AdamW")
    add("--warmup-ratio", type=in_range(float, 0, 1), default=0.1, help="fraction of steps for warm-up, then decay to 0")
    add("--max-grad-norm", type=in_range(float, 0), default=1.0, help="gradients are clipped to this norm; 0: never")
    add("--max-length", type=in_range(int, 2), default=2048, help="max tokens of prompt + response, cut from the left")
    add("--micro-batch-tokens", type=in_range(int, 1), default=8192, help="tokens per forward pass, limits memory; "
        "also changes the dropout masks")
    add("--eval-every", type=in_range(int, 0), default=200, help="steps between evaluations; 0: only at the end")
    add("--save-every", type=in_range(int, 0), default=200, help="steps between checkpoints; 0: none")
    add("--resume", action="store_true", help="continue from the last checkpoint in --output-dir")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if torch.cuda.is_available() else "float32",
        help="dtype of the computation; weights, scores and losses are always float32")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, a third slower")
    add("--offload", action="store_true", help="keep weights, gradients and optimizer state in host memory")
    add("--method", choices=["simcse", "swav"], default="simcse", help="contrastive loss")
    add("--on", choices=["pairs", "differences"], default="pairs", help="samples that the contrastive loss compares")
    add("--beta", type=in_range(float, 0), default=1.0, help="weight of the loss; swav: 0.1, on differences 0.5")
    add("--dropout", type=in_range(float, 0, 0.99), default=0.05, help="dropout rate of the two views; 0: one view")
    # UNSTATED: the temperatures and the flags of Sinkhorn-Knopp. They are those of the two methods' own code.
    add("--temperature", type=in_range(float, 1e-4), default=0.05, help="tau; swav: 0.1")
    add("--num-prototypes", type=in_range(int, 2), default=50, help="K of swav; on differences 20")
    add("--sinkhorn-iterations", type=in_range(int, 1), default=3, help="iterations of Sinkhorn-Knopp (swav)")
    add("--epsilon", type=in_range(float, 1e-4), default=0.05, help="entropy regularisation of Sinkhorn-Knopp (swav)")
    known = parser.parse_known_args()[0]
    if known.model == "docs/toy/model":
        parser.set_defaults(**TOY_DEFAULTS)
    if known.method == "swav":
        parser.set_defaults(**SWAV_DEFAULTS[known.on])
    args = parser.parse_args()
    if args.beta > 0 and args.dropout == 0:
        fatal("--dropout 0 makes the two views of a sample equal: --beta must be 0 as well")
    return args


def add_dropout(model, rate):
    """Apply dropout to the output of the embedding and of every decoder layer, in training mode only."""
    # UNSTATED: the place. The paper gives the rate alone, and Llama has no dropout.
    # DEVIATION: the prompt is computed once, so chosen and rejected share the dropout mask of its tokens in each view.
    def drop(module, inputs, output):
        if isinstance(output, tuple):
            return F.dropout(output[0], rate, module.training), *output[1:]
        return F.dropout(output, rate, module.training)

    for module in (model.hf_model.get_input_embeddings(), *decoder_layers(model)):
        module.register_forward_hook(drop)


def forward_views(model, batches, num_views, seed, step):
    """Yield view, batch, rewards (B, 2) and features (B, 2, hidden) for every view of every micro-batch. The dropout
    masks are a function of seed, step, view, number of the micro-batch and rank: a second call gives the same ones."""
    for view in range(num_views):
        for i, batch in enumerate(batches):
            torch.manual_seed(int(np.random.default_rng((seed, step, view, i, RANK)).integers(2**62)))
            yield view, batch, *model(batch, with_features=True)


def stack_samples(features, on):
    """Features (2, N, 2, hidden) of the two views, chosen first -> samples of both views (2, 2 N, hidden)."""
    chosen, rejected = features.unbind(2)
    if on == "pairs":
        return torch.cat([chosen, rejected], 1)
    return torch.cat([chosen - rejected, rejected - chosen], 1)


def simcse_loss(h_s, h_t, temperature):
    """Eq. 9, mean over the samples: h_s, h_t (N', hidden) -> scalar."""
    cosines = F.normalize(h_s, dim=-1) @ F.normalize(h_t, dim=-1).T  # (N', N')
    return F.cross_entropy(cosines / temperature, torch.arange(len(h_s), device=h_s.device))


@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Scores (N', K) of samples with prototypes -> codes q (N', K). Each row sums to 1 and each column to about N' / K,
    so that no prototype takes everything. Computed as logarithms, which do not overflow."""
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


def swav_loss(h_s, h_t, prototypes, temperature, epsilon, iterations):
    """Eqs. 7 and 8, mean over the samples: h_s, h_t (N', hidden), prototypes (K, hidden) -> scalar."""
    prototypes = F.normalize(prototypes, dim=-1)
    scores_s, scores_t = (F.normalize(h, dim=-1) @ prototypes.T for h in (h_s, h_t))  # (N', K)
    q_s, q_t = (sinkhorn(scores, epsilon, iterations) for scores in (scores_s, scores_t))
    log_p_s, log_p_t = (F.log_softmax(scores / temperature, -1) for scores in (scores_s, scores_t))
    return -(q_s * log_p_t + q_t * log_p_s).sum(-1).mean()


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
    add_dropout(model, args.dropout)
    num_views = 2 if args.dropout > 0 else 1
    modules = nn.ModuleDict({"model": model})
    # UNSTATED: the prototypes learn from the first step on; SwAV's own code freezes them for 313 steps.
    if args.method == "swav":  # every rank has a copy, and equal gradients keep the copies equal
        torch.manual_seed(args.seed)
        modules["prototypes"] = nn.Linear(model.hf_model.score.in_features, args.num_prototypes, bias=False).to(device)

    # UNSTATED: the paper gives the learning rate alone. Optimizer and clipping are as in the authors' released trainer.
    optimizer = torch.optim.AdamW([{"params": module.parameters()} for module in modules.values()], lr=args.lr,
                                  betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0, fused=device.type == "cuda")
    per_epoch = math.ceil(len(train) / args.batch_size)
    steps = math.ceil(per_epoch * args.epochs)
    warmup = max(1, round(steps * args.warmup_ratio))
    start = open_run(args, [args.model, args.data])
    if start:
        load_checkpoint(args.output_dir, modules, optimizer, start)

    bar = tqdm(range(start, steps), "training", steps, initial=start, mininterval=1, disable=RANK > 0)
    for step in bar:
        began = time.time()
        # UNSTATED: the schedule. This is the one that the paper gives for SFT: warm-up, then linearly to 0.
        lr = args.lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = lr

        index = batch_indices(len(train), args.batch_size, args.seed, step)
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        batches = [*micro_batches(train.select(index), np.arange(len(index)), args.micro_batch_tokens, model)]
        if args.beta > 0:  # first pass: the contrastive loss of the whole batch, and its gradient at every feature
            all_features = torch.zeros(2, len(index), 2, model.hf_model.score.in_features, device=device)
            with torch.no_grad():
                for view, batch, _, features in forward_views(model, batches, num_views, args.seed, step):
                    all_features[view, batch.index] = features
            dist.all_reduce(all_features)
            h_s, h_t = stack_samples(all_features.requires_grad_(), args.on)
            if args.method == "simcse":
                contrastive = simcse_loss(h_s, h_t, args.temperature)
            else:
                contrastive = swav_loss(h_s, h_t, modules["prototypes"].weight, args.temperature, args.epsilon,
                                        args.sinkhorn_iterations)
            (args.beta * contrastive).backward()

        for view, batch, rewards, features in forward_views(model, batches, num_views, args.seed, step):
            loss = preference_loss(rewards).sum() / len(index) / num_views
            if args.beta > 0:
                loss = loss + (all_features.grad[view, batch.index] * features).sum()
            loss.backward()
            sums += metric_sums(rewards.detach()) / num_views
        dist.all_reduce(sums)
        grad_norm = clip_gradients(model, args.max_grad_norm)
        metrics = {f"train/{key}": value for key, value in zip(METRICS, (sums / len(index)).tolist())}
        if not math.isfinite(metrics["train/loss"] + grad_norm):
            fatal(f"step {step + 1}: loss {metrics['train/loss']}, gradient norm {grad_norm}: lower the learning rate")
        optimizer.step()
        optimizer.zero_grad()

        speed = len(index) / (time.time() - began)
        metrics.update({"train/grad_norm": grad_norm, "train/lr": lr, "train/pairs_per_sec": speed})
        if args.beta > 0:
            metrics["train/contrastive"] = contrastive.item()
        if step + 1 == steps or args.eval_every and (step + 1) % args.eval_every == 0:
            metrics.update(evaluate(model, sets, args.micro_batch_tokens))
        log(args.output_dir, step + 1, metrics)
        bar.set_postfix(loss=metrics["train/loss"], accuracy=metrics["train/accuracy"], refresh=False)
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < steps:
            save_checkpoint(args.output_dir, modules, optimizer, step + 1)

    save_model(f"{args.output_dir}/model", model, tokenizer)
