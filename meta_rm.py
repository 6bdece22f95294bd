"""Reward modelling for a policy that moves: MetaRM keeps responses of the new policy apart, without new labels.

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), section 3.2, and Alleviating
Shifted Distribution in Human Preference Alignment through Meta-Learning (arXiv 2405.00438).

As PPO shifts the policy, its responses y_1 ... y_k to a prompt come to look alike to the reward model. How well it
still separates them is measured without labels (Eq. 11; (k - 1) / 2k if all are equal, always below (k - 1) / k):

    J(theta) = 2 / k^2  sum_{i<j} sigmoid( |r(x, y_i) - r(x, y_j)| )         averaged over a batch of the meta set

Every step first climbs it, then learns from the comparisons at the point it got to (Eqs. 12 to 14):

    theta'   = theta + eta grad J(theta)
    theta   <- theta - alpha grad L(theta')                                  L: Eq. 2; through AdamW, as in the baseline

To first order this is grad L + eta H_L grad J. Where rewards are linear in the weights, comparisons count less whose
margin the climb has widened already, and more those whose margin it narrowed.

    torchrun meta_rm.py                                                      the toy world; responses of its SFT model
    torchrun --nproc_per_node 8 meta_rm.py --model my-sft-model --policy my-ppo-policy           the second round

Watch train/shift, how far a step climbs, beside train/update, how far AdamW then goes (in the toy world the paper's eta
of 5e-6 makes 1/4,000 of that, its 1e-2 a half); and eval/meta/difference, the mean of |r(x, y_i) - r(x, y_j)| on meta
data held out, beside that of --eta 0 with the same --meta-data. The README says what came of it.
"""

import argparse
import json
import math
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from common import (
    RANK, WORLD, Log, all_sum, clip_gradients, fail, load_checkpoint, load_reward_model, load_rows, load_tokenizer,
    micro_batches, read_row, replaced, sample_responses, save_checkpoint, save_model, say, score, settle, setup, spell,
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
    "eta":          (5e-6,                  1e-2),
    "meta_prompts": (0,                     1000),
    "max_new_tokens": (512,                 12),
    "sample_batch": (8,                     32),
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
    add("--output-dir", default="runs/meta_rm", help="gets model/, metrics.jsonl, args.json, meta.jsonl, checkpoints")
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
    add("--eta", type=float, help="size of the ascent on J; 0: none")
    add("--ascent", choices=["plain", "normalized"], default="plain", help="eta times the gradient, or its direction")
    add("--update", choices=["restore", "alternate"], default="restore", help="step from theta or theta'")
    add("--meta-data", help="rows of prompt and responses; else they are sampled from --policy")
    add("--policy", help="language model to sample from: folder or hub id, by default --model")
    add("--meta-prompts", type=int, help="prompts of --data to sample for; 0: all")
    add("--meta-batch-size", type=int, default=16, help="prompts per optimizer step, over all ranks")
    add("--responses", type=int, default=5, metavar="K", help="to sample for a prompt")
    add("--temperature", type=float, default=1.0, help="of the sampling")
    add("--max-new-tokens", type=int, help="most tokens of a sampled response")
    add("--sample-batch", type=int, help="prompts whose responses are sampled together: memory and random numbers")
    args = settle(parser.parse_args(), DEFAULTS, EVAL_DATA, WORLD)
    if not (0 <= args.eta < math.inf and args.temperature > 0 and args.meta_prompts >= 0 and args.max_new_tokens > 0):
        fail("--eta and --meta-prompts are 0 or more, --temperature and --max-new-tokens above 0")
    if args.responses < 2 or args.meta_batch_size < 1 or args.sample_batch < 1:
        fail("--responses is 2 or more, --meta-batch-size and --sample-batch 1 or more")
    sampled = args.eta and not args.meta_data
    if sampled and args.max_new_tokens >= args.max_length:
        fail(f"--max-new-tokens {args.max_new_tokens} leave nothing of --max-length {args.max_length} to a prompt")
    if sampled and not args.policy and args.model.endswith(".json"):
        fail(f"--model {args.model} cannot answer prompts, its weights are random: give a --policy, or --meta-data")
    return args


def difference(rewards):
    """Eq. 11 for each prompt: rewards (B, k) -> (B,). At equal rewards its gradient is 0."""
    k = rewards.size(1)
    i, j = torch.triu_indices(k, k, 1, device=rewards.device)
    return 2 / k**2 * torch.sigmoid((rewards[:, i] - rewards[:, j]).abs()).sum(1)


def norm(tensors):
    """Euclidean norm of all tensors together, over the shards of all ranks."""
    shards = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
    return math.sqrt(all_sum(sum(torch.linalg.vector_norm(x).double() ** 2 for x in shards)).item())


def preference_loss(rewards, center=0.0):
    """Eq. 2 for each comparison: rewards (B, 2), chosen first -> (B,). logsigmoid, because log(sigmoid) underflows.
    `center` adds center * (r_c + r_r)^2, which pins the mean that Eq. 2 leaves free (arXiv 2312.09244)."""
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]) + center * rewards.sum(1) ** 2


METRICS = "loss", "accuracy", "margin", "tie_rate", "reward_chosen", "reward_rejected"


def metric_sums(rewards):
    """Rewards (B, 2) -> sums of METRICS over the rows, (6,). Accuracy is strict: a tie is an error, see tie_rate."""
    margin = rewards[:, 0] - rewards[:, 1]
    return torch.stack([-F.logsigmoid(margin), margin > 0, margin, margin == 0, *rewards.T]).double().sum(1)


def evaluate(model, sets, micro_tokens):
    """Means of METRICS on every named set, and the 95 % interval of the accuracy (Wilson's)."""
    metrics = {}
    for name, data in sets.items():
        sums = metric_sums(score(model, data, micro_tokens, name))
        result = dict(zip(METRICS, (sums / len(data)).tolist()))
        p, z = result["accuracy"], 1.96**2 / len(data)
        half = math.sqrt(z * p * (1 - p) + z**2 / 4)
        result |= {"accuracy_low": (p + z / 2 - half) / (1 + z), "accuracy_high": (p + z / 2 + half) / (1 + z)}
        metrics |= {f"eval/{name}/{key}": value for key, value in result.items()}
    return metrics


def evaluate_meta(model, held_out, micro_tokens):
    """J, mean and deciles of |r_i - r_j| over the pairs of responses to a prompt, on meta data held out (Fig. 16)."""
    rewards = score(model, held_out, micro_tokens, "meta data")
    i, j = torch.triu_indices(rewards.size(1), rewards.size(1), 1)
    gaps = (rewards[:, i] - rewards[:, j]).abs().flatten()
    metrics = {"J": difference(rewards).mean().item(), "difference": gaps.mean().item()}
    metrics |= {f"difference_{tenth}0": gaps.quantile(tenth / 10).item() for tenth in range(1, 11)}
    return {f"eval/meta/{key}": value for key, value in metrics.items()}


def report(when, metrics):
    """Print what `evaluate_meta` found."""
    say("meta data held out, {}: J {J:.3f}, |reward difference| {difference:.3f}, nine in ten below "
        "{difference_90:.3f}, all below {difference_100:.3f}".format(
            when, **{key.removeprefix("eval/meta/"): value for key, value in metrics.items()}))


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

    # the meta set: read, or sampled for prompts of the data; its last tenth is held out to watch
    watched = args.eta or args.meta_data
    if watched:
        path, given = Path(args.output_dir) / "meta.jsonl", args.meta_data
        if given is None and args.resume and path.exists():
            given = str(path)
        if given is None:
            picked = np.random.default_rng((args.seed, 0, 2)).permutation(len(train))[: args.meta_prompts or None]
            prompts = [read_row(rows[train[int(i)]["row"]])[0] for i in picked]
            flag = "--policy" if args.policy else "--model"
            # UNSTATED: the temperature; a developer says that it was somewhat raised.
            responses = sample_responses(
                args.policy or name, flag, prompts, args.responses, (args.seed, 0, 1), args, device)
        source = given or "the sampled responses"
        meta = tokenize(datasets.Dataset.from_list(responses) if given is None else load_rows(given), source, tokenizer,
                        args.max_length, ("prompt", "responses"))
        if len(counts := set(map(len, meta["response_ids"][:]))) > 1:
            fail(f"{source}: the rows have {min(counts)} to {max(counts)} responses, not all as many")
        if len(meta) < 2:
            fail(f"{source}: two rows are the least, one is held out")
        held_out = meta.select(range(len(meta) - max(1, len(meta) // 10), len(meta)))
        meta = meta.select(range(len(meta) - len(held_out)))
    model = load_reward_model(name, tokenizer, device, args)

    # UNSTATED: the paper gives the learning rate alone. Optimizer and clipping are as in the authors' released trainer.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0,
                                  fused=device.type == "cuda")
    per_epoch = math.ceil(len(train) / args.batch_size)
    steps = math.ceil(per_epoch * args.epochs)
    warmup = max(1, round(steps * args.warmup))
    start = load_checkpoint(args.output_dir, model, optimizer) if args.resume else 0
    log.start(start, steps, train, *([meta] if watched else []))
    if watched and RANK == 0 and given is None:
        with replaced(path) as tmp:
            tmp.write_text("".join(json.dumps(row) + "\n" for row in responses))
    if watched and not start:
        report("before training", evaluate_meta(model, held_out, args.micro_tokens))

    for step in range(start, steps):
        began = time.time()
        # UNSTATED: the schedule. This is the one that the paper gives for SFT: warm-up, then linearly to 0.
        lr = args.lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = lr

        if args.eta:  # climb J on a batch of the meta set, Eq. 12
            index, climbed = step_rows(len(meta), args.meta_batch_size, args.seed, step), torch.zeros(1, device=device)
            for batch in micro_batches(meta, index, args.micro_tokens, model):
                objective = difference(model(batch)).sum() / len(index)
                objective.backward()
                climbed += objective.detach()
            weights = [w for w in model.parameters() if w.grad is not None]
            saved, slope = [w.detach().clone() for w in weights], norm([w.grad for w in weights])
            rate = args.eta / (slope if args.ascent == "normalized" and slope else 1)
            with torch.no_grad():
                for w in weights:
                    w.add_(w.grad, alpha=rate)
            optimizer.zero_grad()

        # learn from the comparisons there, Eq. 13
        index = step_rows(len(train), args.batch_size, args.seed, step)
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        for batch in micro_batches(train, index, args.micro_tokens, model):
            rewards = model(batch)  # (B, 2)
            loss = preference_loss(rewards, args.center).sum() / len(index)
            loss.backward()
            sums += metric_sums(rewards.detach())
        # UNSTATED: --update alternate, another way to read the papers' words; Eq. 14 restores.
        if args.eta and args.update == "restore":  # exactly, and only now step, Eq. 14
            with torch.no_grad():
                for w, old in zip(weights, saved):
                    w.copy_(old)
        grad_norm = clip_gradients(model, args.clip)
        metrics = {"pairs": step // per_epoch * len(train) + step % per_epoch * args.batch_size + len(index)}
        metrics |= {f"train/{key}": value for key, value in zip(METRICS, (all_sum(sums) / len(index)).tolist())}
        if not math.isfinite(metrics["train/loss"] + grad_norm):
            fail(f"step {step + 1}: the loss is {metrics['train/loss']}, the gradient's norm {grad_norm}; lower --eta "
                 f"or --lr (earlier checkpoints in {args.output_dir} are intact)")
        optimizer.step()
        optimizer.zero_grad()
        if args.eta:
            metrics |= {"train/J": all_sum(climbed).item(), "train/shift": rate * slope,
                        "train/update": norm([w.detach() - old for w, old in zip(weights, saved)])}

        speed = len(index) / (time.time() - began)
        metrics |= {"train/grad_norm": grad_norm, "train/lr": lr, "train/pairs_per_sec": speed}
        if step + 1 == steps or args.eval_every and (step + 1) % args.eval_every == 0:
            metrics |= evaluate(model, sets, args.micro_tokens)
            metrics |= evaluate_meta(model, held_out, args.micro_tokens) if watched else {}
        log(step + 1, metrics)
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < steps:
            save_checkpoint(args.output_dir, model, optimizer, step + 1)

    save_model(f"{args.output_dir}/model", model, tokenizer)
    if watched:
        report("after", metrics)
    for key in sets:
        say("{}: accuracy {accuracy:.3f} ({accuracy_low:.3f} to {accuracy_high:.3f})".format(
            key, **{name.removeprefix(f"eval/{key}/"): value for name, value in metrics.items()}))
