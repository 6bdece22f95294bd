"""The papers' claims on real text: every method on a language model of your choice. run.py explains the verdicts.

    python docs/claims/real.py --model SmolLM2-135M-Instruct --data helpful_train.jsonl --seeds 10 \\
        --eval-data helpful=helpful_test.jsonl harmless=harmless_test.jsonl
    python docs/claims/real.py --size 128x3 --lr 5e-4 --iterations 0 ...    a small model, first trained on --data

The first set of --eval-data is in distribution, the others are not. Voters, the model's samples and the judge are made
once, in <output-dir>/shared. A seed has its own reward heads, data order and samples of the policies, in
<output-dir>/<seed>. As in run.py, a cell is a command line of one of the scripts, and finished cells are skipped.
Intervals are over the seeds, which share the pairs: a verdict is about these pairs.

There is no gold reward here, so the second half of --data trains only a judge, a reward model that compares the
policies' responses to prompts of the first set. With --iterations 0 there is neither PPO nor a judge, and all of --data
trains the methods. On one GPU, use several --jobs; the weights that no other cell reads are deleted.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

from run import ROOT, compare, print_cells, print_table, print_verdicts, read_lines, read_metric, run_missing, show

sys.path.append(str(ROOT))
import common  # noqa: E402

DENOISE = {
    "margin": "--margin",
    "flip": "--flip 0.1",
    "S1": "--margin --label-smoothing 0.2 --smooth-on negative",
    "S3": "--soft-targets 1",
    "decile-0": "--percentiles 0 10 --epochs 8",  # a tenth of the data, so more epochs
    "decile-50": "--percentiles 50 60 --epochs 8",
    "decile-90": "--percentiles 90 100 --epochs 8",
    "decile-0-flipped": "--percentiles 0 10 --epochs 8 --flip 1"}
CONTRASTIVE = {
    "dropout": "--beta 0",  # the noise of the views without the loss
    "simcse": "--method simcse",
    "swav": "--method swav"}
META = {  # in float32, because bfloat16 rounds a small step away; meta-0 is their baseline
    "meta-0": "--eta 0",
    "plain-5e-6": "--eta 5e-6",
    "restore-1e-3": "--ascent normalized --eta 1e-3",
    "restore-1e-2": "--ascent normalized --eta 1e-2",
    "restore-1e-1": "--ascent normalized --eta 1e-1",
    "alternate-1e-3": "--ascent normalized --eta 1e-3 --update alternate",
    "alternate-1e-2": "--ascent normalized --eta 1e-2 --update alternate",
    "alternate-1e-1": "--ascent normalized --eta 1e-1 --update alternate"}
POLICIES = {  # name: KL penalty and reward model
    "free-baseline": (0, "baseline"),
    "free-S3": (0, "S3"),
    "free-simcse": (0, "simcse"),
    "held-baseline": (0.05, "baseline"),
    "held-S3": (0.05, "S3"),
    "held-simcse": (0.05, "simcse"),
    "held-meta": (0.05, "restore-1e-2")}
DUELS = {  # the first policy of a comparison: those that it is compared with
    "sft": [*POLICIES],
    "free-baseline": ["free-S3", "free-simcse"],
    "held-baseline": ["held-S3", "held-simcse", "held-meta"]}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    model.add_argument("--model", help="folder or hub id of a language model")
    model.add_argument("--size", help="hidden size x layers of a Llama to train on --data and --text first")
    add("--text", nargs="*", default=[], help="more comparisons, which only the model of --size is trained on")
    add("--data", required=True, help="comparisons, as in the scripts")
    add("--eval-data", nargs="+", type=common.named_source, required=True, metavar="NAME=SOURCE")
    add("--output-dir", type=Path, default=Path("runs/real"))
    add("--pairs", type=int, help="number of rows to use of each file (default: all)")
    add("--seeds", type=int, default=10, help="number of seeds, 2 or more for intervals (default: 10)")
    add("--jobs", type=int, default=1, help="processes; 0: only print (default: 1)")
    add("--cells", default=".*", help="run only those whose names match this regular expression")
    add("--members", type=int, default=10, help="voters (default: 10)")
    add("--lr", default="2e-5", help="peak learning rate of the reward models (default: 2e-5)")
    add("--max-length", type=int, default=512, help="maximum length of prompt plus response in tokens (default: 512)")
    add("--iterations", type=int, default=100, help="PPO iterations (default: 100)")
    add("--max-new-tokens", type=int, default=128, help="maximum length of a response in tokens (default: 128)")
    add("--ppo-lr", type=float, default=5e-6, help="peak learning rate of PPO (default: 5e-6); critics: 3 times that")
    args = parser.parse_args()
    if {"train", "judge"} & {name for name, _ in args.eval_data}:
        parser.error("--eval-data: no set may have the name train or judge")
    return args


def as_messages(prompt, responses):
    """A transcript (or a single question) and responses -> lists of messages, for the model's chat template."""
    if "\n\nHuman:" not in prompt:
        prompt = f"\n\nHuman: {prompt}\n\nAssistant:"
    _, *parts = re.split(r"\n\n(Human|Assistant):", prompt)  # speaker, text, speaker, text, ..., Assistant, nothing
    roles, turns = {"Human": "user", "Assistant": "assistant"}, []
    for speaker, text in zip(parts[:-2:2], parts[1:-2:2]):
        turns.append({"role": roles[speaker], "content": text.strip()})
    return turns, [[{"role": "assistant", "content": text.strip()}] for text in responses]


def write_data(args, folder):
    """Write train.jsonl, judge.jsonl and a file for each set, as conversations if the model has a chat template."""
    is_chat = transformers.AutoTokenizer.from_pretrained(args.model).chat_template is not None
    for name, source in (*args.eval_data, ("train", args.data)):
        rows, lines = common.load_rows(source, "train" if name == "train" else "test"), []
        for row in rows.take(min(args.pairs or len(rows), len(rows))):
            prompt, responses = common.read_row(row)
            if prompt is None:  # chosen and rejected answer different prompts
                continue
            if is_chat and isinstance(prompt, str):
                prompt, responses = as_messages(prompt, responses)
            lines.append(json.dumps({"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}) + "\n")
        if name == "train" and args.iterations:
            common.atomic_write(folder / "judge.jsonl", "".join(lines[len(lines) // 2 :]))
            lines = lines[: len(lines) // 2]
        common.atomic_write(folder / f"{name}.jsonl", "".join(lines))


def make_model(folder, args):
    """A Llama with a BPE of 8,192 tokens, trained for one pass over the chosen texts of --data and --text."""
    texts = {}  # a dictionary keeps the order and drops repetitions
    for source in (args.data, *args.text):
        for row in common.load_rows(source):
            prompt, responses = common.read_row(row)
            if isinstance(prompt, str):  # not None: chosen and rejected answer the same prompt
                texts[prompt + responses[0]] = None
    if not texts:
        raise SystemExit("error: --size: --data and --text hold no texts (conversations need a --model)")
    tokenizer = transformers.GPT2Tokenizer(pad_token="<pad>").train_new_from_iterator(texts, 8192)
    hidden_size, num_layers = map(int, args.size.split("x"))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=8192, hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_attention_heads=4,
        num_hidden_layers=num_layers, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id))
    tokens = np.concatenate([[*ids[:1024], tokenizer.eos_token_id] for ids in tokenizer(list(texts)).input_ids])
    blocks = torch.tensor(tokens[: len(tokens) // 2048 * 2048]).view(-1, 4, 512)  # (steps, 4, 512)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1), []
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=len(blocks), pct_start=0.05)
    for batch in tqdm(blocks[torch.randperm(len(blocks))], "language model", mininterval=5):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"language model: {len(tokens):,} tokens, loss {losses[0]:.2f} to {np.mean(losses[-50:]):.2f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_cells(args):
    """-> the cells that all seeds share, and those of a seed."""
    names = [name for name, _ in args.eval_data]
    sets = " ".join(f"{name}={{shared}}/{name}.jsonl" for name in names)
    length = f"--max-length {args.max_length}"
    setting = f"--model {{model}} {length} --lr {args.lr} --batch-size 32"
    at_end = "--eval-every 0 --save-every 0"  # evaluate at the end, no checkpoints
    sample = f"ppo_loop.py {length} --max-new-tokens {args.max_new_tokens} --rollout-batch-size 32 --iterations 0"
    shared = {
        "vote": f"vote_strength.py {setting} --data {{shared}}/train.jsonl --resume --seed 100 "
                f"--members {args.members} --eval-data",
        "meta": f"{sample} --model {{model}} --data {{shared}}/train.jsonl"}

    setting += f" --seed {{seed}} {at_end} --eval-data {sets}"
    train = f"{setting} --data {{shared}}/train.jsonl"
    cells = {"baseline": f"baseline_rm.py {train}"}
    for name, flags in DENOISE.items():
        cells[name] = f"denoise_rm.py {setting} --data {{shared}}/vote/train.jsonl {flags}"
    for name, flags in CONTRASTIVE.items():
        cells[name] = f"contrastive_rm.py {train} {flags}"
    for name, flags in META.items():
        cells[name] = f"meta_rm.py {train} --meta-data {{shared}}/meta/samples.jsonl --dtype float32 {flags}"
    models = " ".join(f"{name}={{dir}}/{name}/model" for name in ("baseline", *CONTRASTIVE))
    cells["features"] = f"eval.py {length} --eval-data {sets} --reward-models {models}"
    if not args.iterations:
        return shared, cells

    judge = setting.replace("{seed}", "1000")
    shared["judge"] = f"baseline_rm.py {judge} --data {{shared}}/judge.jsonl"
    prompts = f"--data {{shared}}/{names[0]}.jsonl --seed {{seed}} --num-samples 200 --k 1"
    cells["sft"] = f"{sample} {prompts} --model {{model}}"
    for name, (kl_coef, reward_model) in POLICIES.items():
        cells[f"ppo-{name}"] = (
            f"ppo_loop.py --model {{model}} {length} --max-new-tokens {args.max_new_tokens} --seed {{seed}} {at_end} "
            f"--iterations {args.iterations} --batch-size 16 --rollout-batch-size 32 --lr {args.ppo_lr} "
            f"--critic-lr {3 * args.ppo_lr} --kl-coef {kl_coef} --reward-model {{dir}}/{reward_model}/model "
            f"--data {{shared}}/train.jsonl --num-samples 0 --eval-data {sets.split()[0]}")
        cells[name] = f"{sample} {prompts} --model {{dir}}/ppo-{name}/policy"
    for first, others in DUELS.items():
        files = " ".join(f"{name}={{dir}}/{name}/samples.jsonl" for name in (first, *others))
        cells[f"against-{first}"] = (
            f"eval.py --judge {{shared}}/judge/model --prompt-format text {length} --policies {files}")
    return shared, cells


def net_wins(folders, policy, against):
    """Win - lose by the judge over the seeds (S,)."""
    values = np.full(len(folders), math.nan)
    for i, folder in enumerate(folders):
        path = folder / f"against-{against}" / "eval.json"
        for record in json.loads(path.read_text()) if path.exists() else []:
            if record["table"] == "wins" and record["policy"] == policy:
                values[i] = record["net"]
    return values


def print_votes(rows):
    """Figs. 1 and 2: rows with strengths -> how many are below 0, and the std of the votes in parts of the data."""
    columns = "mean preference difference", "std preference difference"
    votes = [[row[column] for column in columns] for row in rows if row[columns[0]] is not None]
    strength, std = np.array(sorted(votes)).T
    parts = [f"{part.mean():.3f}" for part in np.array_split(std, 20)]
    print(f"strength < 0 in {np.mean(strength < 0):.1%} of {len(votes)} training pairs; std of the votes in each "
          f"twentieth, weakest first: {', '.join(parts)}\n")


def print_results(args, folders):
    """The tables and verdicts of what has been run."""
    names = [name for name, _ in args.eval_data]
    keys = [f"eval/{name}/accuracy" for name in names]
    loss = f"eval/{names[0]}/loss"
    first, *others = keys
    others = [key for key in others if read_metric(folders, "baseline", key).mean() > 0.5]  # below, damage would help
    print_cells(folders, "reward models", ["baseline", *DENOISE, *CONTRASTIVE], [*keys, loss], "baseline")
    print_cells(folders, "MetaRM", META, [*keys, "mean/train/shift", "mean/train/update", "eval/meta/difference"],
                "meta-0")
    print_cells(folders, "features", ["baseline", *CONTRASTIVE], [f"{name}/overlap" for name in names])

    claims = [
        ("Fig. 4", 0.5, "decile-0", first), ("Fig. 4", "decile-50", "decile-90", first),
        ("Fig. 5", "decile-0-flipped", 0.5, first), ("Fig. 5", "decile-0-flipped", "decile-50", first)]
    claims += [("Fig. 8", name, "baseline", first) for name in ("margin", "flip", "S1", "S3")]
    claims += [("Fig. 8", "baseline", name, loss) for name in ("S1", "S3")]
    claims += [("section 3.1", name, "baseline", key) for name in ("simcse", "swav") for key in (first, *others)]
    claims += [("Fig. 11", "baseline", "simcse", f"{name}/overlap") for name in names]
    ascents = []
    for name in META:
        shift, update = (read_metric(folders, name, f"mean/train/{key}").mean() for key in ("shift", "update"))
        if shift > 0.01 * update:  # a smaller step changes nothing
            ascents.append(name)
    claims += [("Fig. 16", name, "meta-0", "eval/meta/difference") for name in ascents]
    claims += [("MetaRM, other sets", name, "meta-0", key) for name in ascents for key in others]
    if args.iterations:
        columns, rows = [f"eval/{names[0]}/{key}" for key in ("kl", "length", "ended")], []
        for name in POLICIES:
            row = [show(read_metric(folders, f"ppo-{name}", key)) for key in columns]
            rows.append([name, *row, show(net_wins(folders, name, "sft"))])
        print_table(["policies", *columns, "win - lose against the SFT model"], rows)
        claims += [("Fig. 12", "ppo-free-baseline", "ppo-free-simcse", columns[0])]
    claims = [compare(folders, *claim) for claim in claims]
    for name in ascents:
        gain = read_metric(folders, name, first) - read_metric(folders, "meta-0", first)
        text = f"{name} costs no accuracy on {names[0]}: gain + half a point, in points"
        claims.append(("MetaRM Fig. 4", text, 100 * gain + 0.5, 1))
    if args.iterations:
        for figure, policy, against in (
                ("section 2.5", "free-baseline", "sft"), ("section 2.5", "held-baseline", "sft"),
                ("Fig. 10", "free-S3", "free-baseline"), ("Fig. 10", "held-S3", "held-baseline"),
                ("Fig. 12", "free-simcse", "free-baseline"), ("Fig. 13", "held-simcse", "held-baseline"),
                ("Table 3", "held-meta", "held-baseline")):
            text = f"win - lose by the judge: {policy} against {against}"
            claims.append((figure, text, net_wins(folders, policy, against), 1))
        accuracies = [f"{read_metric([folders[0].parent / 'shared'], 'judge', key)[0]:.3f}" for key in keys]
        print(f"accuracy of the judge on {', '.join(names)}: {', '.join(accuracies)}\n")
    print_verdicts(claims)


if __name__ == "__main__":
    args = parse_args()
    output = args.output_dir.resolve()
    shared, folders = output / "shared", [output / str(seed) for seed in range(args.seeds)]
    for folder in (shared, *folders):
        folder.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("seeds", "jobs", "cells")}
    if (output / "args.json").exists() and json.loads((output / "args.json").read_text()) != settings:
        raise SystemExit(f"error: {output} was begun with other flags: choose another --output-dir")
    common.atomic_write(output / "args.json", json.dumps(settings, indent=1))
    if args.size:
        args.model = str(shared / "model")
    elif Path(args.model).exists():
        args.model = str(Path(args.model).resolve())
    shared_cells, cells = make_cells(args)
    if args.jobs:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.jobs)))
        if args.size and not (shared / "model/tokenizer.json").exists():
            make_model(shared / "model", args)
        if not (shared / "train.jsonl").exists():
            write_data(args, shared)
        commands = " ".join(cells.values())
        unread = [name for name in cells if f"{{dir}}/{name}/" not in commands]
        run_missing(shared_cells, args.cells, [shared], args.model, args.jobs)
        run_missing(cells, args.cells, folders, args.model, args.jobs, unread)
    if (shared / "vote/train.jsonl").exists():
        print_votes(read_lines(shared / "vote/train.jsonl"))
    print_results(args, folders)
