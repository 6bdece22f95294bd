"""Reward modelling with labels that are known to be noisy: flip, drop, smooth, soften, or ask for a margin.

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), sections 2.3 to 2.5.

vote_strength.py gives every comparison a strength mu, the mean margin of an ensemble. What the paper does with it comes
down to swapping chosen and rejected in some pairs, and giving each pair two numbers, a margin m and a target t:

    L = -E [ t log sigmoid(x) + (1 - t) log sigmoid(-x) ],     x = r(x, y_c) - r(x, y_r) - m

    --percentiles LO HI   train on that part of the order from weak to strong alone                   Figs. 4 to 6
    --drop F              leave the weakest share F out, the usual rival of flipping
    --flip F              swap the weakest share F; their mu becomes -mu                              section 2.4
    --soft-targets T      t = sigmoid(mu / T)
    --smoothing A         t = 1 - A, on all pairs or, with --smooth-on negative, where mu < 0         Eq. 5
    --noise-rate E        t = (1 - E) / (1 - 2 E), unbiased where a share E of the labels is wrong    arXiv 2403.00409
    --margin              m = mu, negative for suspect pairs, which relaxes them                      Eq. 6

They combine in this order, each share being one of what the flags before it left; without any this is baseline_rm.py.
(Soft targets are what the strength says, whoever was called chosen: beside them --flip changes nothing.)
--unlabelled FILE adds pairs that were voted on but have no label, such as a policy's own, with t = sigmoid(mu).

The paper's "soft label + margin" can be read in three ways:

    S1, as the text has it    --margin --smoothing 0.2 --smooth-on negative
    S2                        --margin --smoothing 0.2
    S3                        --soft-targets 1

    python vote_strength.py && torchrun denoise_rm.py --flip 0.1                            the toy world, two minutes
    torchrun --nproc_per_node 8 denoise_rm.py --model my-sft-model --flip 0.1 --margin      the authors' release

Watch eval/<set>/accuracy_second, accuracy by a label that did not suffer from the noise (gold in the toy world).
"""

import argparse
import math
import time

import datasets
import numpy as np
import torch
import torch.nn.functional as F

from common import (
    WORLD, Log, all_sum, clip_gradients, fail, load_checkpoint, load_reward_model, load_rows, load_tokenizer,
    micro_batches, one_line, save_checkpoint, save_model, say, score, settle, setup, spell, step_rows, tokenize,
    toy_model)

DEFAULTS = {  #     the paper's            the toy's: taken when --model is toy
    "data":         ("fnlp/hh-rlhf-strength-cleaned", "toy"),
    "epochs":       (1.0,                   3.0),
    "batch_size":   (32,                    32),
    "lr":           (5e-6,                  5e-4),
    "max_length":   (2048,                  64),
    "micro_tokens": (8192,                  4096),
    "eval_every":   (200,                   100),
    "save_every":   (200,                   100),
}
EVAL_DATA = {  # of --data, when --eval-data is not given
    "fnlp/hh-rlhf-strength-cleaned": ["valid=fnlp/hh-rlhf-strength-cleaned:validation"],
    "toy": ["id=toy:id", "ood=toy:ood", "shifted=toy:shifted", "noisy=toy:noisy"],
}
STRENGTH = "mean preference difference"
LABELS = "gold", "GPT4 label"  # columns with a second label: 1 for chosen, 0 for rejected, -1 for neither


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=spell(DEFAULTS), formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.error, add = fail, parser.add_argument
    add("--model", default="toy", help="a language or reward model: folder, hub id, or config.json (random weights)")
    add("--tokenizer", help="folder or hub id, if not the model's; for a config.json one is trained on the data")
    add("--data", help="toy | file (.jsonl .json .parquet .gz) | folder of save_to_disk | hub id[[:config]:split]")
    add("--eval-data", nargs="*", metavar="NAME=SOURCE", help="named sets to evaluate on; by default those of --data")
    add("--output-dir", default="runs/denoise_rm", help="gets model/, metrics.jsonl, args.json and checkpoints")
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
    add("--strength", help="the data with their strengths, from vote_strength.py or the authors' release; by default "
        "--data itself if it has them, else runs/vote_strength/train.jsonl")
    add("--percentiles", type=float, nargs=2, default=[0, 100], metavar=("LO", "HI"), help="0 100: all pairs")
    add("--drop", type=float, default=0.0, metavar="F", help="leave out the weakest share F; 0: none")
    add("--flip", type=float, default=0.0, metavar="F", help="swap the weakest share F; 0: none (the paper: 0.1)")
    add("--margin", action="store_true", help="subtract the strength from the difference of the rewards")
    add("--smoothing", type=float, default=0.0, metavar="A", help="label smoothing; 0: none (the paper: probably 0.2)")
    add("--smooth-on", choices=["all", "negative"], default="all", help="smooth all pairs, or those of strength < 0")
    add("--soft-targets", type=float, default=0.0, metavar="T", help="temperature of targets sigmoid(mu / T); 0: hard")
    add("--unlabelled", metavar="FILE", help="voted on by vote_strength.py --eval-data: more pairs, with soft targets")
    add("--noise-rate", type=float, default=0.0, metavar="E", help="of the unbiased loss, below 0.5; 0: none")
    args = settle(parser.parse_args(), DEFAULTS, EVAL_DATA, WORLD)
    limits = {"drop": 1, "flip": 1, "smoothing": 0.5, "noise_rate": 0.4999, "soft_targets": math.inf}
    for name, most in limits.items():
        if not 0 <= getattr(args, name) <= most:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} is not between 0 and {most}")
    if args.smooth_on == "negative" and not args.smoothing:
        fail("--smooth-on negative says where, --smoothing has to say how much")
    if not 0 <= args.percentiles[0] < args.percentiles[1] <= 100:
        fail("--percentiles {} {} leave nothing: they are two numbers from 0 to 100, the lower first".format(
            *args.percentiles))
    if args.strength and not needs_strength(args):
        fail(f"--strength {args.strength} changes nothing without --percentiles, --drop, --flip, --margin, "
             "--soft-targets or --smooth-on negative")
    return args


def needs_strength(args):
    """Whether any of the flags asks for the strengths."""
    return bool(args.margin or args.flip or args.drop or args.soft_targets or args.percentiles != [0, 100]
                or args.smoothing and args.smooth_on == "negative")


def read_strength(source, rows, index, flag="--strength"):
    """The strengths (N,) of the rows that `index` (N,) numbers, from a source with the same rows in the same order; NaN
    where a row has none. Exits if it is about other rows."""
    voted = load_rows(source)
    for column in (STRENGTH, "chosen", "rejected"):
        if column not in voted.column_names:
            fail(f"{flag} {source}: no column '{column}', it has {', '.join(voted.column_names)}")
    if len(voted) != len(rows):
        fail(f"--strength {source} has {len(voted):,} rows, the data {len(rows):,}: let vote_strength.py vote on these")
    for column in {"prompt", "chosen", "rejected"} & {*voted.column_names} & {*rows.column_names}:
        for number, (one, other) in enumerate(zip(voted[column][:], rows[column][:]), 1):
            if one != other:
                fail(f"--strength {source}: row {number} is not that of the data: let vote_strength.py vote on these")
    try:
        return np.array(voted[STRENGTH][:], float)[index]
    except (TypeError, ValueError) as error:
        fail(f"{flag} {source}: '{STRENGTH}' is not a number everywhere: {one_line(error)}")


def select(strength, percentiles=(0, 100), drop=0.0):
    """The rows to train on, a sorted int array: the part between two percentiles of strength (N,), less its weakest."""
    order = np.argsort(strength, kind="stable")
    low, high = (round(len(order) * percentile / 100) for percentile in percentiles)
    order = order[low:high]
    return np.sort(order[round(len(order) * drop) :])


def targets(strength, flip=0.0, margin=False, smoothing=0.0, smooth_on="all", soft_targets=0.0, noise_rate=0.0):
    """Strengths (N,) -> whether to swap (N,) bool, margin m (N,), target t (N,); see the equation at the top."""
    swap = np.zeros(len(strength), bool)
    swap[np.argsort(strength, kind="stable")[: round(len(strength) * flip)]] = True
    mu = np.where(swap, -strength, strength)
    t = 1 / (1 + np.exp(-mu / soft_targets)) if soft_targets else np.ones(len(mu))
    # UNSTATED: the size of A; 0.2 is where the paper's training loss settles.
    t = np.where((mu < 0) | (smooth_on == "all"), t + smoothing * (1 - 2 * t), t)
    return swap, mu if margin else np.zeros(len(mu)), (t - noise_rate) / (1 - 2 * noise_rate)


def preference_loss(rewards, margin, target, center=0.0):
    """Eqs. 2, 5 and 6 for each comparison: rewards (B, 2), chosen first, margin (B,), target (B,) -> (B,).
    `center` adds center * (r_c + r_r)^2, which pins the mean that Eq. 2 leaves free (arXiv 2312.09244)."""
    # DEVIATION: as printed, Eq. 6 has the margin outside the sigmoid, where it has no gradient.
    x = rewards[:, 0] - rewards[:, 1] - margin
    return -(target * F.logsigmoid(x) + (1 - target) * F.logsigmoid(-x)) + center * rewards.sum(1) ** 2


METRICS = "loss", "accuracy", "margin", "tie_rate", "reward_chosen", "reward_rejected"


def metric_sums(rewards):
    """Rewards (B, 2) -> sums of METRICS over the rows, (6,). Accuracy is strict: a tie is an error, see tie_rate."""
    margin = rewards[:, 0] - rewards[:, 1]
    return torch.stack([-F.logsigmoid(margin), margin > 0, margin, margin == 0, *rewards.T]).double().sum(1)


def by_label_and_strength(rewards, data, segments=20):
    """Rewards (N, 2) -> accuracy by the second label and on the pairs where both labels agree (Fig. 8), and in equal
    segments of strength, weakest first (Figs. 27 and 28), as far as the data have them."""
    right, metrics = (rewards[:, 0] > rewards[:, 1]).numpy(), {}
    for column in [name for name in LABELS if name in data.column_names][:1]:
        second = np.array([value if value in (0, 1) else -1 for value in data[column][:]])
        if (second >= 0).any():
            metrics["accuracy_second"] = (right == second)[second >= 0].mean()
        if (second == 1).any():
            metrics["accuracy_agreeing"] = right[second == 1].mean()
    if STRENGTH in data.column_names:
        strength = np.array([math.nan if value is None else value for value in data[STRENGTH][:]], float)
        order = np.argsort(strength, kind="stable")[: np.isfinite(strength).sum()]  # NaN comes last
        for number, segment in enumerate(np.array_split(order, segments) if len(order) >= segments else (), 1):
            metrics[f"accuracy_segment_{number:02}"] = right[segment].mean()
    return metrics


def evaluate(model, sets, micro_tokens):
    """Means of METRICS on every named set, and the 95 % interval of the accuracy (Wilson's)."""
    metrics = {}
    for name, data in sets.items():
        rewards = score(model, data, micro_tokens, name)
        sums = metric_sums(rewards)
        result = dict(zip(METRICS, (sums / len(data)).tolist()))
        p, z = result["accuracy"], 1.96**2 / len(data)
        half = math.sqrt(z * p * (1 - p) + z**2 / 4)
        result |= {"accuracy_low": (p + z / 2 - half) / (1 + z), "accuracy_high": (p + z / 2 + half) / (1 + z)}
        result |= by_label_and_strength(rewards, data)
        metrics |= {f"eval/{name}/{key}": float(value) for key, value in result.items()}
    return metrics


if __name__ == "__main__":
    args = parse_args()
    device = setup(args.seed)
    log = Log(args.output_dir, vars(args), args.resume)

    # data and model
    name = toy_model() if args.model == "toy" else args.model
    rows = load_rows(args.data)
    tokenizer = load_tokenizer(args.tokenizer or name, rows)
    train = tokenize(rows, args.data, tokenizer, args.max_length)
    sources = dict(pair.split("=", 1) for pair in args.eval_data)
    sets = {key: tokenize(load_rows(source, "test"), source, tokenizer, args.max_length)
            for key, source in sources.items()}

    # strengths: which rows to train on, and for each swap, margin and target
    strength = np.zeros(len(train))
    if needs_strength(args):
        source = args.strength or (args.data if STRENGTH in rows.column_names else "runs/vote_strength/train.jsonl")
        strength = read_strength(source, rows, np.array(train["row"][:]))
        kept = np.flatnonzero(np.isfinite(strength))
        kept = kept[select(strength[kept], args.percentiles, args.drop)]
        if not len(kept):
            fail(f"--strength {source}, --percentiles and --drop leave no row to train on")
        say(f"{len(kept):,} of {len(train):,} rows kept; {np.isnan(strength).sum():,} have no strength")
        train, strength = train.select(kept), strength[kept]
    swap, margin, target = targets(strength, args.flip, args.margin, args.smoothing, args.smooth_on, args.soft_targets,
                                   args.noise_rate)
    if args.unlabelled:
        more = load_rows(args.unlabelled)
        mu = read_strength(args.unlabelled, more, np.arange(len(more)), "--unlabelled")
        added = tokenize(more, args.unlabelled, tokenizer, args.max_length)
        mu = mu[np.array(added["row"][:])]
        train = datasets.concatenate_datasets([part.select_columns(["prompt_ids", "response_ids", "length"])
                                               for part in (train, added.select(np.flatnonzero(np.isfinite(mu))))])
        mu = mu[np.isfinite(mu)]
        swap, margin = (np.append(x, np.zeros_like(x, shape=len(mu))) for x in (swap, margin))
        target = np.append(target, 1 / (1 + np.exp(-mu)))
    say(f"{swap.sum():,} pairs flipped, {(target != 1).sum():,} targets other than 1, mean margin {margin.mean():.3f}")
    swap, margin, target = (torch.tensor(x, device=device) for x in (swap, margin.astype("f4"), target.astype("f4")))
    model = load_reward_model(name, tokenizer, device, args)

    # UNSTATED: the paper gives the learning rate alone. Optimizer and clipping are as in the authors' released trainer.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0,
                                  fused=device.type == "cuda")
    per_epoch = math.ceil(len(train) / args.batch_size)
    steps = math.ceil(per_epoch * args.epochs)
    warmup = max(1, round(steps * args.warmup))
    start = load_checkpoint(args.output_dir, model, optimizer) if args.resume else 0
    log.start(start, steps, train, swap, margin, target)

    for step in range(start, steps):
        began = time.time()
        # UNSTATED: the schedule. This is the one that the paper gives for SFT: warm-up, then linearly to 0.
        lr = args.lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = lr

        index = step_rows(len(train), args.batch_size, args.seed, step)
        sums, trained = torch.zeros(len(METRICS), dtype=torch.float64, device=device), torch.zeros(1, device=device)
        for batch in micro_batches(train, index, args.micro_tokens, model):
            rewards = model(batch)  # (B, 2)
            rewards = torch.where(swap[batch.index][:, None], rewards.flip(1), rewards)
            loss = preference_loss(rewards, margin[batch.index], target[batch.index], args.center).sum() / len(index)
            loss.backward()
            trained += loss.detach()
            sums += metric_sums(rewards.detach())
        grad_norm = clip_gradients(model, args.clip)
        metrics = {"pairs": step // per_epoch * len(train) + step % per_epoch * args.batch_size + len(index)}
        metrics |= {f"train/{key}": value for key, value in zip(METRICS, (all_sum(sums) / len(index)).tolist())}
        if not math.isfinite(metrics["train/loss"] + grad_norm):
            fail(f"step {step + 1}: the loss is {metrics['train/loss']}, the gradient's norm {grad_norm}; lower --lr "
                 f"(earlier checkpoints in {args.output_dir} are intact)")
        optimizer.step()
        optimizer.zero_grad()

        metrics["train/objective"] = all_sum(trained).item()
        speed = len(index) / (time.time() - began)
        metrics |= {"train/grad_norm": grad_norm, "train/lr": lr, "train/pairs_per_sec": speed}
        if step + 1 == steps or args.eval_every and (step + 1) % args.eval_every == 0:
            metrics |= evaluate(model, sets, args.micro_tokens)
        log(step + 1, metrics)
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < steps:
            save_checkpoint(args.output_dir, model, optimizer, step + 1)

    save_model(f"{args.output_dir}/model", model, tokenizer)
    for key in sets:
        say("{}: accuracy {accuracy:.3f} ({accuracy_low:.3f} to {accuracy_high:.3f})".format(
            key, **{name.removeprefix(f"eval/{key}/"): value for name, value in metrics.items()}))
