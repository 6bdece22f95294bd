"""Reward modelling with a contrastive loss beside it: features that tell chosen from rejected.

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), section 3.1.

The features of chosen and rejected responses, the hidden states f(x, y) that the reward head reads, overlap. Two ways
to pull them apart, each on the features of the pairs or on their differences, N' = 2 N samples from N comparisons:

    pairs          h = f(x, y_c) and f(x, y_r)
    differences    h = f(x, y_c) - f(x, y_r) and f(x, y_r) - f(x, y_c)

Every sample is computed twice, h_s and h_t, with other dropout. SimCSE (Eq. 9) asks for the other view of a sample
among those of all samples; SwAV (Eqs. 7, 8) predicts from one view to which of K prototypes c_k the other belongs:

    SimCSE   l_i = -log  exp(cos(h_s_i, h_t_i) / tau)  /  sum_j exp(cos(h_s_i, h_t_j) / tau)
    SwAV     l_i = -sum_k q_s_k log p_t_k - sum_k q_t_k log p_s_k,      p_t = softmax_k(h_t c_k / tau),  q: Sinkhorn

    L = L_rm + beta L_cl,      L_rm: Eq. 2, averaged over the two views

    torchrun contrastive_rm.py                                                    the toy world, SimCSE on the pairs
    torchrun --nproc_per_node 8 contrastive_rm.py --model my-sft-model --method swav --on differences

The negatives are those of the whole batch. Its features are first computed without a graph and gathered; the gradient
of L_cl at each of them is kept, and handed on when the same features are computed again, micro-batch by micro-batch.
Watch train/contrastive, and eval/<set>/overlap of the features of chosen and rejected. In the toy world it helps from
random weights and, at the paper's beta, hurts from those of a language model; see the README.
"""

import argparse
import itertools
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import (
    RANK, WORLD, Log, all_sum, clip_gradients, decoder_layers, fail, load_checkpoint, load_reward_model, load_rows,
    load_tokenizer, micro_batches, save_checkpoint, save_model, say, score, separate_rows, settle, setup, spell,
    step_rows, tokenize, toy_model)

DEFAULTS = {  #     the paper's            the toy's: taken when --model is toy
    "data":         ("Anthropic/hh-rlhf",   "toy"),
    "epochs":       (1.0,                   3.0),
    "batch_size":   (16,                    32),
    "lr":           (5e-6,                  5e-4),
    "max_length":   (2048,                  64),
    "micro_tokens": (8192,                  4096),
    "eval_every":   (200,                   100),
    "save_every":   (200,                   100),
}
METHODS = {  # (method, on): beta, temperature, prototypes
    # UNSTATED: the temperatures, here those of the two methods' own code, as are the two flags of Sinkhorn.
    ("simcse", "pairs"): (1.0, 0.05, 0), ("simcse", "differences"): (1.0, 0.05, 0),
    ("swav", "pairs"): (0.1, 0.1, 50), ("swav", "differences"): (0.5, 0.1, 20),
}
EVAL_DATA = {  # of --data, when --eval-data is not given
    "Anthropic/hh-rlhf": ["test=Anthropic/hh-rlhf:test"],
    "toy": ["id=toy:id", "ood=toy:ood", "shifted=toy:shifted", "noisy=toy:noisy"],
}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=spell(DEFAULTS), formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.error, add = fail, parser.add_argument
    add("--model", default="toy", help="a language or reward model: folder, hub id, or config.json (random weights)")
    add("--tokenizer", help="folder or hub id, if not the model's; for a config.json one is trained on the data")
    add("--data", help="toy | file (.jsonl .json .parquet .gz) | folder of save_to_disk | hub id[[:config]:split]")
    add("--eval-data", nargs="*", metavar="NAME=SOURCE", help="named sets to evaluate on; by default those of --data")
    add("--output-dir", default="runs/contrastive_rm", help="gets model/, metrics.jsonl, args.json and checkpoints")
    add("--seed", type=int, default=0, help="of the reward head and the order of the data")
    add("--epochs", type=float, help="passes over the data")
    add("--batch-size", type=int, help="comparisons per optimizer step, over all ranks")
    add("--lr", type=float, help="peak learning rate of AdamW")
    add("--max-length", type=int, help="most tokens of a prompt with one response; prompts lose their oldest tokens")
    add("--micro-tokens", type=int, help="most padded tokens in one forward pass: memory only, not the result")
    add("--eval-every", type=int, help="steps between evaluations; 0: only at the end")
    add("--save-every", type=int, help="steps between checkpoints; 0: none")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")
    add("--warmup", type=float, default=0.1, help="share of the steps in which the rate rises; then it falls to 0")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if torch.cuda.is_available() else "float32",
        help="of the computation; weights, scores and losses are float32 always")
    add("--attention", choices=["sdpa", "flex"], default="sdpa", help="flex: packed rows, FlexAttention and compiled "
        "layers, on GPUs")
    add("--gradient-checkpointing", action="store_true", help="less memory for a third more computation")
    add("--offload", action="store_true", help="keep weights, gradients and optimizer in host memory: slower, larger")
    add("--center", type=float, default=0.0, help="weight of the centring term (r_c + r_r)^2; 0: none, as in the paper")
    add("--method", choices=["simcse", "swav"], default="simcse", help="the contrastive loss")
    add("--on", choices=["pairs", "differences"], default="pairs", help="the samples it compares")
    add("--beta", type=float, help="its weight; 0: none")
    add("--dropout", type=float, default=0.05, help="share of the hidden values, after embedding and layers; 0: none")
    add("--temperature", type=float, help="tau")
    add("--prototypes", type=int, help="K, of SwAV")
    add("--sinkhorn-iterations", type=int, default=3, help="of SwAV's assignment to prototypes")
    add("--epsilon", type=float, default=0.05, help="of SwAV's assignment: the smaller, the harder")
    add("--plot", action="store_true", help="draw Fig. 11 into --output-dir, with matplotlib")
    args = settle(parser.parse_args(), DEFAULTS, EVAL_DATA, WORLD)
    for name, value in zip(("beta", "temperature", "prototypes"), METHODS[args.method, args.on]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not (0 <= args.beta < math.inf and 0 <= args.dropout < 1 and args.temperature > 0 and args.epsilon > 0):
        fail("--beta is 0 or more, --dropout is from 0 to below 1, --temperature and --epsilon are above 0")
    if args.sinkhorn_iterations < 1 or args.method == "swav" and args.prototypes < 2:
        fail("--sinkhorn-iterations is 1 or more, --prototypes 2 or more")
    if args.plot and not args.eval_data:
        fail("--plot draws the features of --eval-data: name a set")
    if args.beta and not args.dropout:
        fail("--dropout 0 makes the two views of a sample equal: nothing to learn, so --beta must be 0 as well")
    return args


class Dropout:
    """Dropout behind the embedding and every decoder layer, where a stock Llama has none. A value's fate depends on its
    row in the data, its token's branch and position, and its channel, by a hash, and not on the batch around it:
    micro-batches, ranks and the layout change nothing."""

    def __init__(self, model, rate):
        # UNSTATED: the place; the paper gives the rate alone.
        self.model, self.rate, self.keys = model, rate, None
        for number, module in enumerate([model.model.get_input_embeddings(), *decoder_layers(model)]):
            module.register_forward_hook(lambda module, inputs, output, number=number: self.drop(output, number))

    def start(self, seed, step, view, batch):
        """From now on drop as in view 0 or 1 of this batch in this step."""
        if self.rate:
            rows = [hash((seed, step, view, int(row))) for row in (batch.index if len(batch.index) else [0])]
            rows = torch.tensor(rows, device=batch.tree.device)[batch.tree]  # (R, T); padding gets any
            self.keys = scramble(rows + batch.branch * 2**32 + batch.positions)
            if self.model.layout == "separate":
                self.keys = self.keys.flatten()[separate_rows(batch)[0]]

    def stop(self):
        """From now on drop nothing."""
        self.keys = None

    def drop(self, output, layer):
        """What a module gave, hidden states (R, T, hidden), with some of them dropped."""
        if self.keys is None:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        channel = torch.arange(hidden.size(-1), device=hidden.device)
        x = scramble(scramble(self.keys + 1_000_003 * layer)[..., None] + channel)
        hidden = hidden * ((x & 0xFFFFFF) >= self.rate * 2**24) / (1 - self.rate)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def scramble(x):
    """A hash of int64 numbers, after splitmix64; what overflows is lost, as it should."""
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)


def samples(features, on):
    """Features (..., N, 2, hidden), chosen first -> the samples of the contrastive loss (..., 2 N, hidden)."""
    chosen, rejected = features.unbind(-2)
    parts = (chosen, rejected) if on == "pairs" else (chosen - rejected, rejected - chosen)
    return torch.cat(parts, -2)


def simcse(views, temperature):
    """Eq. 9, mean over the samples: views (2, S, hidden) -> scalar."""
    first, second = F.normalize(views, dim=-1)
    return F.cross_entropy(first @ second.T / temperature, torch.arange(len(first), device=views.device))


@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Codes q (S, K) of scores (S, K) with prototypes: every row sums to 1, every prototype gets about S / K."""
    codes = scores.float() / epsilon  # their logarithms, which do not underflow
    for _ in range(iterations):
        codes = codes - codes.logsumexp(0) - math.log(codes.size(1))
        codes = codes - codes.logsumexp(1, keepdim=True)
    return codes.exp()


def swav(views, prototypes, temperature, epsilon, iterations):
    """Eqs. 7 and 8, mean over the samples: views (2, S, hidden), prototypes (K, hidden), made unit length -> scalar."""
    scores = F.normalize(views, dim=-1) @ F.normalize(prototypes, dim=-1).T  # (2, S, K)
    codes = torch.stack([sinkhorn(part, epsilon, iterations) for part in scores])
    return -(codes.flip(0) * F.log_softmax(scores / temperature, -1)).sum(-1).mean(1).sum()


def preference_loss(rewards, center=0.0):
    """Eq. 2 for each comparison: rewards (B, 2), chosen first -> (B,). logsigmoid, because log(sigmoid) underflows.
    `center` adds center * (r_c + r_r)^2, which pins the mean that Eq. 2 leaves free (arXiv 2312.09244)."""
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]) + center * rewards.sum(1) ** 2


METRICS = "loss", "accuracy", "margin", "tie_rate", "reward_chosen", "reward_rejected"


def metric_sums(rewards):
    """Rewards (B, 2) -> sums of METRICS over the rows, (6,). Accuracy is strict: a tie is an error, see tie_rate."""
    margin = rewards[:, 0] - rewards[:, 1]
    return torch.stack([-F.logsigmoid(margin), margin > 0, margin, margin == 0, *rewards.T]).double().sum(1)


@torch.no_grad()
def overlap(features):
    """How much the features (N, 2, hidden) of chosen and rejected overlap along the line through their means: the area
    that two histograms of 50 bins share, 0 to 1 (Fig. 11 as a number)."""
    line = (features[:, 0] - features[:, 1]).mean(0)
    places = (features @ line).T  # (2, N)
    low, high = places.min().item(), places.max().item()
    return sum(min(pair) for pair in zip(*(torch.histc(x, 50, low, high).tolist() for x in places))) / len(features)


def evaluate(model, sets, micro_tokens):
    """Means of METRICS on every named set, the 95 % interval of the accuracy (Wilson's), overlap of the features."""
    metrics = {}
    for name, data in sets.items():
        rewards, features = score(model, data, micro_tokens, name, with_features=True)
        sums = metric_sums(rewards)
        result = dict(zip(METRICS, (sums / len(data)).tolist()))
        p, z = result["accuracy"], 1.96**2 / len(data)
        half = math.sqrt(z * p * (1 - p) + z**2 / 4)
        result |= {"accuracy_low": (p + z / 2 - half) / (1 + z), "accuracy_high": (p + z / 2 + half) / (1 + z)}
        result["overlap"] = overlap(features)
        metrics |= {f"eval/{name}/{key}": value for key, value in result.items()}
    return metrics


def plot(path, model, sets, micro_tokens):
    """Fig. 11: the features of chosen and rejected on their two principal components, a panel for each set."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, len(sets), figsize=(4 * len(sets), 4), squeeze=False)
    for axis, (name, data) in zip(axes[0], sets.items()):
        features = score(model, data, micro_tokens, name, with_features=True)[1]
        flat = (features - features.mean((0, 1))).flatten(0, 1)
        places = (flat @ torch.pca_lowrank(flat, center=False)[2][:, :2]).view(len(features), 2, 2)
        for k, label in enumerate(("chosen", "rejected")):
            axis.scatter(*places[:, k].T, s=4, alpha=0.5, label=label)
        axis.set(title=f"{name}: overlap {overlap(features):.2f}", xticks=[], yticks=[])
        axis.legend(loc="upper right")
    if RANK == 0:
        figure.tight_layout()
        figure.savefig(path, dpi=120)


if __name__ == "__main__":
    args = parse_args()
    device = setup(args.seed)
    log = Log(args.output_dir, vars(args), args.resume, ("resume", "output_dir", "micro_tokens", "save_every", "plot"))

    # data and model
    name = toy_model() if args.model == "toy" else args.model
    rows = load_rows(args.data)
    tokenizer = load_tokenizer(args.tokenizer or name, rows)
    train = tokenize(rows, args.data, tokenizer, args.max_length)
    sources = dict(pair.split("=", 1) for pair in args.eval_data)
    sets = {key: tokenize(load_rows(source, "test"), source, tokenizer, args.max_length)
            for key, source in sources.items()}
    model = load_reward_model(name, tokenizer, device, args)
    dropout, views = Dropout(model, args.dropout), range(2 if args.dropout else 1)
    parts = nn.ModuleDict({"model": model})
    # UNSTATED: the prototypes learn from the first step on; the code of SwAV freezes them at first.
    if args.method == "swav":  # a copy on every rank, which the same gradients keep the same
        torch.manual_seed(args.seed)
        parts["prototypes"] = nn.Linear(model.model.score.in_features, args.prototypes, bias=False).to(device)

    # UNSTATED: the paper gives the learning rate alone. Optimizer and clipping are as in the authors' released trainer.
    optimizers = [torch.optim.AdamW(part.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0,
                                    fused=device.type == "cuda") for part in parts.values()]
    per_epoch = math.ceil(len(train) / args.batch_size)
    steps = math.ceil(per_epoch * args.epochs)
    warmup = max(1, round(steps * args.warmup))
    start = load_checkpoint(args.output_dir, parts, optimizers) if args.resume else 0
    log.start(start, steps, train)

    for step in range(start, steps):
        began = time.time()
        # UNSTATED: the schedule. This is the one that the paper gives for SFT: warm-up, then linearly to 0.
        lr = args.lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr

        index = step_rows(len(train), args.batch_size, args.seed, step)
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        batches, place = [*micro_batches(train, index, args.micro_tokens, model)], np.zeros(len(train), int)
        place[index] = np.arange(len(index))  # of a row in the batch
        if args.beta:  # the contrastive loss of the whole batch, and its gradient at the features
            features = torch.zeros(2, len(index), 2, model.model.score.in_features, device=device)
            with torch.no_grad():
                for view, batch in itertools.product(views, batches):
                    dropout.start(args.seed, step, view, batch)
                    features[view, place[batch.index]] = model(batch, with_features=True)[1]
            h = samples(all_sum(features).requires_grad_(), args.on)
            contrastive = simcse(h, args.temperature) if args.method == "simcse" else swav(
                h, parts["prototypes"].weight, args.temperature, args.epsilon, args.sinkhorn_iterations)
            (args.beta * contrastive).backward()

        for view, batch in itertools.product(views, batches):
            dropout.start(args.seed, step, view, batch)
            rewards, again = model(batch, with_features=True)  # (B, 2), (B, 2, hidden)
            loss = preference_loss(rewards, args.center).sum() / len(index) / len(views)
            if args.beta:
                loss = loss + (features.grad[view, place[batch.index]] * again).sum()
            loss.backward()
            sums += metric_sums(rewards.detach()) / len(views)
        dropout.stop()
        grad_norm = clip_gradients(model, args.clip)
        metrics = {"pairs": step // per_epoch * len(train) + step % per_epoch * args.batch_size + len(index)}
        metrics |= {f"train/{key}": value for key, value in zip(METRICS, (all_sum(sums) / len(index)).tolist())}
        if not math.isfinite(metrics["train/loss"] + grad_norm):
            fail(f"step {step + 1}: the loss is {metrics['train/loss']}, the gradient's norm {grad_norm}; lower --lr "
                 f"(earlier checkpoints in {args.output_dir} are intact)")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        metrics |= {"train/contrastive": contrastive.item()} if args.beta else {}

        speed = len(index) / (time.time() - began)
        metrics |= {"train/grad_norm": grad_norm, "train/lr": lr, "train/pairs_per_sec": speed}
        if step + 1 == steps or args.eval_every and (step + 1) % args.eval_every == 0:
            metrics |= evaluate(model, sets, args.micro_tokens)
        log(step + 1, metrics)
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < steps:
            save_checkpoint(args.output_dir, parts, optimizers, step + 1)

    save_model(f"{args.output_dir}/model", model, tokenizer)
    if args.plot:
        plot(f"{args.output_dir}/features.png", model, sets, args.micro_tokens)
    for key in sets:
        say("{}: accuracy {accuracy:.3f} ({accuracy_low:.3f} to {accuracy_high:.3f})".format(
            key, **{name.removeprefix(f"eval/{key}/"): value for name, value in metrics.items()}))
