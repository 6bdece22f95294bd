"""Preference strength by voting: which comparisons does an ensemble of reward models believe?

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), section 2.2.

Train M reward models (Eq. 2) that differ by their seed alone: in the first weights of the head and the order of the
data. Each votes on every comparison with its margin, and the strength of a comparison is the mean of the votes (Eq. 4):

    d_m  = r_m(x, y_c) - r_m(x, y_r)
    mean = 1/M sum_m d_m                          below 0: the ensemble refuses the label that it was trained on
    std  = sqrt( 1/M sum_m (d_m - mean)^2 )       the population's, divided by M

    torchrun vote_strength.py                                        the toy world, ten members
    torchrun --nproc_per_node 8 vote_strength.py --model my-sft-model --data train.jsonl      a member per GPU at a time
    python vote_strength.py --eval-data policy=runs/meta_rm/meta.jsonl     and on what a policy said, which has no label

The rows go, with their strength and all votes, to <output-dir>/train.jsonl, under the column names of the authors'
release. Watch the table: the weakest groups hold the wrong labels.
"""

import argparse
import collections
import itertools
import json
import math
import re
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F

from common import (
    RANK, WORLD, Log, all_sum, barrier, clip_gradients, fail, load_reward_model, load_rows, load_tokenizer,
    micro_batches, replaced, say, score, settle, setup, spell, step_rows, tokenize, toy_model)

DEFAULTS = {  #     the paper's            the toy's: taken when --model is toy
    "data":         ("Anthropic/hh-rlhf",   "toy"),
    "epochs":       (1.0,                   3.0),
    "batch_size":   (32,                    32),
    "lr":           (5e-6,                  5e-4),
    "max_length":   (2048,                  64),
    "micro_tokens": (8192,                  4096),
}
EVAL_DATA = {  # of --data, when --eval-data is not given
    "Anthropic/hh-rlhf": ["test=Anthropic/hh-rlhf:test"],
    "toy": ["id=toy:id", "ood=toy:ood", "shifted=toy:shifted", "noisy=toy:noisy"],
}
LABELS = "gold", "GPT4 label"  # columns with a second label: 1 for chosen, 0 for rejected, -1 for neither


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=spell(DEFAULTS), formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.error, add = fail, parser.add_argument
    add("--model", default="toy", help="a language or reward model: folder, hub id, or config.json (random weights)")
    add("--tokenizer", help="folder or hub id, if not the model's; for a config.json one is trained on the data")
    add("--data", help="toy | file (.jsonl .json .parquet .gz) | folder of save_to_disk | hub id[[:config]:split]")
    add("--eval-data", nargs="*", metavar="NAME=SOURCE", help="named sets to vote on as well, without training on them")
    add("--output-dir", default="runs/vote_strength", help="gets train.jsonl, NAME.jsonl, report.json, members/")
    add("--seed", type=int, default=0, help="of the first member; the others follow")
    add("--epochs", type=float, help="passes over the data")
    add("--batch-size", type=int, help="comparisons per optimizer step")
    add("--lr", type=float, help="peak learning rate of AdamW")
    add("--max-length", type=int, help="most tokens of a prompt with one response; prompts lose their oldest tokens")
    add("--micro-tokens", type=int, help="most padded tokens in one forward pass: memory only, not the result")
    add("--resume", action="store_true", help="go on with the members that --output-dir lacks")
    add("--warmup", type=float, default=0.1, help="share of the steps in which the rate rises; then it falls to 0")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if torch.cuda.is_available() else "float32",
        help="of the computation; weights, scores and losses are float32 always")
    add("--attention", choices=["sdpa", "flex"], default="sdpa", help="flex: packed rows, FlexAttention and compiled "
        "layers, on GPUs")
    add("--gradient-checkpointing", action="store_true", help="less memory for a third more computation")
    add("--offload", action="store_true", help="keep weights, gradients and optimizer in host memory: slower, larger")
    add("--members", type=int, default=10, help="M, the reward models that vote")
    add("--shard", action="store_true", help="all ranks train each member together; else every rank trains its own")
    add("--cross-fit", type=int, default=0, metavar="K", help="vote on each of K parts by models of the other parts; "
        "0: by models that were trained on it, as in the paper")
    add("--label", help=f"column with a second label or with votes [chosen, rejected, ...]; else {' or '.join(LABELS)}")
    add("--plot", action="store_true", help="draw Figs. 1 to 3 into --output-dir")
    args = parser.parse_args()
    settle(args, DEFAULTS, EVAL_DATA, WORLD if args.shard else 1, taken=["train", "metrics"])
    if args.members < 1:
        fail(f"--members {args.members}: somebody has to vote")
    if args.cross_fit < 0 or args.cross_fit == 1:
        fail(f"--cross-fit {args.cross_fit}: the parts are 2 or more, or 0 for none")
    return args


def strength(scores):
    """Eq. 4: rewards (M, N, 2), chosen first -> mean (N,) and population std (N,) of the M margins."""
    margins = scores[..., 0] - scores[..., 1]
    return margins.mean(0), margins.std(0)


def second_label(values):
    """A column of second labels -> how much it is for chosen (N,), NaN where it says nothing: 1, 0 and -1 (chosen,
    rejected, neither) become 1, -1 and NaN; votes [chosen, rejected, ...] their difference."""
    def side(value):
        if isinstance(value, list):
            votes = [vote for vote in value[:2] if isinstance(vote, (int, float))]
            return votes[0] - votes[1] if len(votes) == 2 else math.nan
        return {1: 1, 0: -1}.get(value, math.nan) if isinstance(value, (int, float)) else math.nan

    return np.array([side(value) for value in values], float)


def agreement(votes):
    """Share of the second labels that agree with the first, among those that take a side; NaN if none does."""
    sides = votes[np.isfinite(votes) & (votes != 0)]
    return float((sides > 0).mean()) if len(sides) else math.nan


def groups(mean, std, votes, n=20):
    """Figs. 2 and 3: the rows sorted by mean strength, cut into n equal groups -> for each the share of the rows up to
    its upper edge, mean of mean, mean of std, and agreement, (n, 4)."""
    parts = np.array_split(np.argsort(mean, kind="stable"), n)
    edges = np.cumsum([len(part) for part in parts]) / len(mean)
    return np.array([[edge, mean[part].mean(), std[part].mean(), agreement(votes[part])]
                     for edge, part in zip(edges, parts) if len(part)])


def rank_correlation(a, b):
    """Spearman's: the correlation of the ranks, ties sharing theirs, over the rows where both are known."""
    known, ranks = np.isfinite(a) & np.isfinite(b), []
    for values in (a[known], b[known]):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    constant = known.sum() < 2 or min(np.std(rank) for rank in ranks) == 0
    return math.nan if constant else float(np.corrcoef(*ranks)[0, 1])


def total_steps(n, args):
    """Optimizer steps of one reward model that is trained on n rows."""
    return math.ceil(math.ceil(n / args.batch_size) * args.epochs)


def fit(name, tokenizer, data, args, seed, device, ranks, log):
    """Train one reward model, by the loop of baseline_rm.py; `log` gets the metrics of every step. -> RewardModel"""
    model = load_reward_model(name, tokenizer, device, args, seed, ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0,
                                  fused=device.type == "cuda")
    steps = total_steps(len(data), args)
    warmup = max(1, round(steps * args.warmup))
    for step in range(steps):
        lr = args.lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = lr

        index = step_rows(len(data), args.batch_size, seed, step)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in micro_batches(data, index, args.micro_tokens, model):
            rewards = model(batch)  # (B, 2)
            margin = rewards[:, 0] - rewards[:, 1]
            loss = -F.logsigmoid(margin).sum() / len(index)  # Eq. 2
            loss.backward()
            sums += torch.stack([loss.detach(), (margin > 0).sum() / len(index)])
        grad_norm = clip_gradients(model, args.clip)
        loss, accuracy = (all_sum(sums) if ranks > 1 else sums).tolist()
        if not math.isfinite(loss + grad_norm):
            fail(f"seed {seed}, step {step + 1}: the loss is {loss}, the gradient's norm {grad_norm}; lower --lr "
                 f"(the members in {args.output_dir} are intact)")
        optimizer.step()
        optimizer.zero_grad()
        log({"train/loss": loss, "train/accuracy": accuracy, "train/grad_norm": grad_norm, "train/lr": lr})
    return model


def as_pairs(rows):
    """Rows as they are or, of a prompt with k responses, such as meta_rm.py samples, their k // 2 disjoint pairs; which
    of the two is called chosen says nothing."""
    if "chosen" in rows.column_names or "responses" not in rows.column_names:
        return rows
    return datasets.Dataset.from_list([
        {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
        for row in rows for chosen, rejected in zip(row["responses"][::2], row["responses"][1::2])])


def read_votes(path, sets):
    """The votes of one member, {set: rewards (N, 2)}, or None if it has not voted. Exits if the file is broken."""
    if not path.exists():
        return None
    try:
        votes = {key: np.array(rewards, float) for key, rewards in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError):
        votes = {}
    if {key: rewards.shape for key, rewards in votes.items()} != {key: (len(data), 2) for key, data in sets.items()}:
        fail(f"{path} does not hold the votes of one member on these data: delete it, --resume makes it anew")
    return votes


def write_back(path, rows, index, votes):
    """Write raw rows, with the votes (M, N, 2) on those that `index` (N,) numbers, as JSON lines under the column names
    of the authors' release; null where a row was dropped."""
    mean, std = strength(votes)
    columns = {"chosen score list": votes[..., 0].T, "rejected score list": votes[..., 1].T,
               "mean preference difference": mean, "std preference difference": std}
    for name, values in columns.items():
        column = [None] * len(rows)
        for i, value in zip(index, values.tolist()):
            column[i] = value
        rows = rows.remove_columns([name] if name in rows.column_names else []).add_column(name, column)
    with replaced(path) as tmp:
        rows.to_json(tmp)


def plot(path, mean, std, table):
    """Figs. 1, 2 and 3."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 4, figsize=(18, 4))
    for axis, values, label in ((axes[0], mean, "mean of the votes"), (axes[1], std, "std of the votes")):
        axis.hist(values, bins=60, density=True)
        axis.set(xlabel=label, ylabel="density")
    axes[0].axvline(0, color="black", linewidth=0.8)
    number = np.arange(1, len(table) + 1)
    axes[2].plot(number, table[:, 1], "o-", label="mean")
    axes[2].plot(number, table[:, 2], "s-", label="std")
    axes[2].set(xlabel="twentieth of the rows, weakest first", ylabel="strength", xticks=number[::2])
    axes[2].legend()
    axes[3].plot(table[:, 1], table[:, 3], "o-")
    axes[3].axhline(0.5, color="black", linewidth=0.8)
    axes[3].set(xlabel="mean strength of the group", ylabel="agreement with the second label", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    args = parse_args()
    device = setup(args.seed)
    ranks = WORLD if args.shard else 1  # that train a member together
    log = Log(args.output_dir, vars(args), args.resume,
              ("resume", "output_dir", "micro_tokens", "members", "shard", "label", "plot"))

    if log.old.get("members", 0) > args.members:
        fail(f"--members {args.members}: the run in {args.output_dir} has {log.old['members']}")

    # data
    name = toy_model() if args.model == "toy" else args.model
    sources = {"train": args.data, **dict(pair.split("=", 1) for pair in args.eval_data)}
    raw = {key: as_pairs(load_rows(source, "train" if key == "train" else "test")) for key, source in sources.items()}
    if args.label and args.label not in raw["train"].column_names:
        fail(f"--label {args.label}: {args.data} has only {', '.join(raw['train'].column_names)}")
    tokenizer = load_tokenizer(args.tokenizer or name, raw["train"])
    sets = {key: tokenize(rows, sources[key], tokenizer, args.max_length) for key, rows in raw.items()}
    train, parts = sets["train"], args.cross_fit
    if parts > len(train):
        fail(f"--cross-fit {parts}: there are only {len(train)} rows")
    sizes = [len(train) - len(range(part, len(train), parts)) for part in range(parts)] or [len(train)]

    # train the members, this rank's own or, where the ranks work together, all; each leaves its votes
    paths = [Path(args.output_dir) / f"members/{member}.json" for member in range(args.members)]
    mine = range(args.members)[RANK // ranks :: WORLD // ranks]
    todo = [member for member in mine if not (args.resume and read_votes(paths[member], sets))]
    steps = sum(total_steps(size, args) for size in sizes)
    start, seconds = steps * (len(mine) - len(todo)), collections.Counter()
    log.start(start, steps * len(mine), *sets.values())
    count = itertools.count(start + 1)
    barrier()
    for member in todo:
        seed = args.seed + member
        part_of = np.random.default_rng((seed, 1)).permutation(len(train)) % len(sizes)
        votes = {key: torch.zeros(len(data), 2) for key, data in sets.items()}
        for part in range(len(sizes)):
            learn = train.select(np.flatnonzero(part_of != part)) if parts else train
            began = time.time()
            model = fit(name, tokenizer, learn, args, seed, device, ranks,
                        lambda metrics: log(next(count), {"member": member, **metrics}))
            seconds["train"], began = seconds["train"] + time.time() - began, time.time()
            for key, data in sets.items():
                judge = np.flatnonzero(part_of == part) if parts and key == "train" else np.arange(len(data))
                rewards = score(model, data.select(judge), args.micro_tokens, key)
                votes[key][judge] += rewards if key == "train" else rewards / len(sizes)
            del model
            seconds["score"] += time.time() - began
        if RANK % ranks == 0:
            with replaced(paths[member]) as tmp:
                tmp.write_text(json.dumps({key: rewards.tolist() for key, rewards in votes.items()}))
    barrier()

    # count the votes
    if RANK == 0:
        members, report = [read_votes(path, sets) for path in paths], {}
        for key, rows in raw.items():
            votes = np.stack([member[key] for member in members])
            write_back(Path(args.output_dir) / f"{key}.jsonl", rows, sets[key]["row"][:], votes)
            mean, std = strength(votes)
            label = args.label or next((label for label in LABELS if label in rows.column_names), None)
            second = second_label(sets[key][label] if label in rows.column_names else [None] * len(mean))
            report[key] = {
                "rows": len(mean), "refused": float((mean < 0).mean()), "agreement": agreement(second),
                "rank_correlation": rank_correlation(mean, second), "groups": groups(mean, std, second).tolist()}
            notes = {"agreement": "second label, where it takes a side, agrees with",
                     "rank_correlation": "its rank correlation with the mean is"}
            say("; ".join([f"{key}: mean strength below 0 in {report[key]['refused']:.3f} of {len(mean):,} rows"] + [
                f"{note} {report[key][name]:.3f}" for name, note in notes.items() if math.isfinite(report[key][name])]))
        say("\n".join([f"{args.data}, weakest first\nrows up to   mean    std    agreement with the second label"] + [
            "{:8.0%}{:9.3f}{:8.3f}{:8.3f}".format(*group).replace("nan", "  -")
            for group in report["train"]["groups"]]))
        report["seconds"] = dict(seconds)
        with replaced(Path(args.output_dir) / "report.json") as tmp:
            tmp.write_text(re.sub(r"\bNaN\b", "null", json.dumps(report)))  # JSON knows no NaN
        if args.plot:
            plot(Path(args.output_dir) / "strength.png", *strength(np.stack([member["train"] for member in members])),
                 np.array(report["train"]["groups"]))
