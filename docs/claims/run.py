"""The experiments behind docs/results.md: the papers' claims in the toy world, over seeds, by the scripts as they are.

    python docs/claims/run.py generalisation --seeds 10 --jobs 2
    python docs/claims/run.py generalisation --seeds 3 --size 128x4      a larger SFT model: hidden size x layers

A cell is a command line of one of the scripts. It runs once for each seed, in runs/claims/<seed>/<cell>; finished cells
are skipped. A seed has its own comparisons, meta set, reward heads, data order and samples; the SFT model is shared.

    a ± b         mean over the seeds and half-width of its 95 % interval (Student's t); differences are paired
    p             two-sided, for a mean of 0, with Holm's correction for the questions under the same figure
    seen          p < 0.05, and above 0
    not seen      the interval, at level 1 - 0.05 / (questions under the figure), ends below half a point of accuracy
                  or, for other quantities, below 0
    undecided     neither
"""

import argparse
import functools
import importlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "docs/toy"))
import make  # noqa: E402

LAST = {"vote_strength.py": "train.jsonl", "ppo_loop.py": "samples.jsonl", "eval.py": "eval.json"}  # a cell's last file
TRAIN = ("--model {model} --data {dir}/toy-0.1/train.jsonl --seed {seed} --batch-size 32 --lr 5e-4 --max-length 64 "
         "--epochs 3 --eval-every 0 --save-every 0 --eval-data id={dir}/toy-0.1/id.jsonl ood={dir}/toy-0.1/ood.jsonl "
         "shifted={dir}/toy-0.1/shifted.jsonl noisy={dir}/toy-0.1/noisy.jsonl")


def save_model(folder, **kwargs):
    """Train a language model of the toy world, unless it is there."""
    if not (folder / "tokenizer.json").exists():
        make.make_model(make.make_tokenizer(), **kwargs).save_pretrained(folder)
        make.make_tokenizer().save_pretrained(folder)


def make_world(folder, seed, flip, model):
    """Write the files of docs/toy for another seed, and `wrong`: the training rows with wrong labels; `pairs`: all
    pairs of five nearly perfect responses to each of 100 prompts (Fig. 16); `random`: a model without training."""
    if (folder / "meta.jsonl").exists():
        return
    save_model(folder / "random", seed=seed, steps=0)
    splits = "train", "noisy", "id", "ood", "shifted"
    files = {split: make.make_comparisons(split, None, seed, flip) for split in splits}
    files["wrong"] = [row for row in files["train"] if row["gold"] == 0]
    rng, files["pairs"] = random.Random(f"pairs {seed}"), []
    for row in files["id"][:100]:
        responses = [make.make_response(rng, row["prompt"], rng.uniform(0.8, 1)) for _ in range(5)]
        files["pairs"] += [{"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
                           for chosen, rejected in itertools.combinations(responses, 2)]
    torch.manual_seed(seed)
    policy, prompts = AutoModelForCausalLM.from_pretrained(model), [row["prompt"] for row in files["train"][:1000]]
    files["meta"] = make.sample(policy, make.make_tokenizer(), prompts, 5)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_missing(cells, names, folders, model, jobs, unread=()):
    """Run the missing cells whose names match the regular expression `names`: those of a seed in order, because they
    need each other, and seeds in parallel. `unread`: cells whose weights no other cell reads; they are deleted."""
    cells = {name: command for name, command in cells.items() if re.fullmatch(names, name)}

    def run_seed(folder):
        values = {"dir": folder, "seed": folder.name, "model": model, "shared": folder.parent / "shared"}
        for name, command in cells.items():
            script, *flags = [word.format(**values) for word in command.split()]
            if not (folder / name / LAST.get(script, "model/tokenizer.json")).exists():
                with open(folder / f"{name}.log", "w") as log:
                    process = subprocess.run(
                        [sys.executable, script, "--output-dir", folder / name, *flags], cwd=ROOT, stdout=log,
                        stderr=log, env={"OMP_NUM_THREADS": "1", **os.environ})
                if process.returncode:
                    raise SystemExit(f"error: cell {name} failed, see {folder / name}.log")
            if name in unread:
                for path in (folder / name / "model").glob("*.safetensors"):
                    path.unlink()
            bar.update()

    bar = tqdm(total=len(cells) * len(folders), desc="cells")
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run_seed, folders))


def read_lines(path):
    """The rows of a .jsonl file; none if it is missing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure_votes(rows):
    """The quantities of Figs. 2 and 3, by name. Their accuracies leave out the rows where gold has no preference."""
    columns = "mean preference difference", "std preference difference", "gold"
    strength, std, gold = np.array(sorted([row[column] for column in columns] for row in rows), float).T
    labels, std = np.array_split(gold, 20), [part.mean() for part in np.array_split(std, 20)]
    parts = {"weakest": labels[0], "strongest": labels[-1], "at 0": gold[np.argsort(abs(strength))[: len(labels[0])]]}
    return {"strength < 0": np.mean(strength < 0), "wrong": np.mean(gold == 0),
            "wrong if < 0": np.mean(gold[strength < 0] == 0), "< 0 if wrong": np.mean(strength[gold == 0] < 0),
            **{f"accuracy, {name}": part[part >= 0].mean() for name, part in parts.items()},
            "std, weakest": std[0], "std, 20 to 40 %": np.mean(std[4:8]), "std, strongest": std[-1]}


@functools.cache
def read_cell(folder, cell):
    """The numbers of a cell: those of its last record and, with a prefix, of its first and means over iterations; what
    vote_strength.py and eval.py say ("<set>/<key>", "<set>/<segment>/<key>")."""
    records, numbers = read_lines(folder / cell / "metrics.jsonl"), {}
    parts = {"": records[-1:], "first/": records[:1], "mean/": records,
             "KL 0 to 1/": [x for x in records if x.get("ppo/kl", 99) < 1],
             "KL 6 to 8/": [x for x in records if 6 <= x.get("ppo/kl", -1) < 8]}
    for prefix, part in parts.items():
        for key in {key for record in part for key in record}:
            numbers[prefix + key] = np.mean([record[key] for record in part if key in record])
    if (folder / cell / "train.jsonl").exists():
        numbers.update(measure_votes(read_lines(folder / cell / "train.jsonl")))
    for record in [x for path in folder.glob("*/eval.json") for x in json.loads(path.read_text())]:
        place = "/".join(str(record[key]) for key in ("set", "segment") if key in record)
        if record.get("model") == cell and record["table"] in ("reward models", "strength"):
            numbers.update({f"{place}/{key}": value for key, value in record.items()})
        elif record.get("model") == cell and record["table"] == "differences":  # a histogram from 0 to 1, of 20 bins
            key = f"{place}/normalized_difference"
            numbers[key] = numbers.get(key, 0) + record["size"] * record["density"] / 20
    return numbers


def read_metric(folders, cells, key):
    """A number of a cell over the seeds, or the mean over several cells, separated by commas (S,); NaN where it is
    missing. `cells` may also be a constant."""
    if isinstance(cells, float):
        return np.full(len(folders), cells)
    return np.array([np.mean([read_cell(x, cell).get(key, math.nan) for cell in cells.split(",")]) for x in folders])


def interval(values, level=0.95):
    """Values of the seeds (S,) -> mean, half-width of its interval, two-sided p for a mean of 0, by Student's t. With
    t = sqrt(S - 1) tan(x), its density is proportional to cos(x)^(S - 2)."""
    edges, df = np.linspace(0, math.pi / 2, 200_001), len(values) - 1
    tail = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2)[::-1] ** (df - 1))[::-1]
    t, p = math.sqrt(df) * np.tan(edges[:-1]), tail / tail[0]
    mean, error = values.mean(), max(values.std(ddof=1), 1e-12) / math.sqrt(len(values))
    return mean, np.interp(level - 1, -p, t) * error, np.interp(abs(mean) / error, t, p)


def show(values, scale=1, sign=""):
    """Values of the seeds (S,) -> "mean ± half", or "-" if one is missing. Scale 100: percentages or points."""
    mean, half, _ = interval(scale * values)
    if math.isnan(mean):
        return "-"
    return f"{mean:{sign}.1f} ± {half:.1f}" if scale == 100 else f"{mean:{sign}.3g} ± {half:.2g}"


def compare(folders, figure, a, b, key, key_b=None):
    """The claim that a number is larger in cell a than in cell b: figure, what is above 0 if it holds, its values over
    the seeds (S,), and 100 for accuracies or 1."""
    values = read_metric(folders, a, key) - read_metric(folders, b, key_b or key)
    text = f"{key} of {a} - {key_b} of {b}" if key_b else f"{key}: {a} - {b}"
    return figure, text, values, 100 if "accuracy" in key else 1


def print_table(head, rows):
    """Print a Markdown table without the rows where everything is missing."""
    rows = [row for row in rows if {*row[1:]} != {"-"}]
    if rows:
        print("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), end="\n\n")


def print_cells(folders, title, cells, keys, base=None):
    """A row for each cell. Accuracies are gains over the cell `base`, in points, except in its own row."""
    def entry(cell, key):
        if "accuracy" in key and base not in (None, cell):
            return show(compare(folders, "", cell, base, key)[2], 100, "+")
        return show(read_metric(folders, cell, key), 100 if "accuracy" in key else 1)

    rows = []
    for cell in cells:
        rows.append([cell, *(entry(cell, key) for key in keys)])
    print_table([title, *keys], rows)


def print_verdicts(claims):
    """A row for each claim, in the form that `compare` gives; claims whose cells are missing are left out."""
    claims, rows = [claim for claim in claims if not np.isnan(claim[2]).any()], []
    for figure in dict.fromkeys(claim[0] for claim in claims):
        family = [claim for claim in claims if claim[0] == figure]
        p_values = np.array([interval(claim[2])[2] for claim in family])
        order = np.argsort(p_values)  # Holm's correction: the smallest p times m, the next times m - 1, never falling
        p_values[order] = np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)).clip(max=1)
        for (_, text, values, scale), p in zip(family, p_values):
            mean, half, _ = interval(values, 1 - 0.05 / len(family))
            verdict = "undecided"
            if p < 0.05 and mean > 0:
                verdict = "seen"
            elif mean + half < (0.005 if scale == 100 else 0):
                verdict = "not seen"
            rows.append([figure, text, show(values, scale, "+"), f"{p:.2g}", verdict])
    print_table(["figure", "above 0 if the claim holds (accuracies in points)", "measured", "p", "verdict"], rows)
    print(f"{len(rows)} questions")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["denoising", "generalisation", "ppo"])
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds, 2 or more (default: 10)")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each; 0: only print (default: 1)")
    parser.add_argument("--cells", default=".*", help="run only those whose names match this regular expression")
    parser.add_argument("--size", help="hidden size x layers of the SFT model (default: docs/toy/model, 64x2)")
    args = parser.parse_args()
    runs, model, table = Path("runs/claims").resolve(), ROOT / "docs/toy/model", importlib.import_module(args.table)
    if args.size:
        runs, model = runs / args.size, runs / args.size / "model"
        save_model(model, **dict(zip(("hidden_size", "num_layers"), map(int, args.size.split("x")))))
    folders = [runs / str(seed) for seed in range(args.seeds)]
    if args.jobs:
        for folder, flip in itertools.product(folders, table.FLIPS):
            make_world(folder / f"toy-{flip}", int(folder.name), flip, model)
        run_missing(table.CELLS, args.cells, folders, model, args.jobs)
    print(f"**{args.table}**, SFT model {args.size or '64x2'}, seeds 0 to {args.seeds - 1}\n")
    for row in table.TABLES:
        print_cells(folders, *row)
    print_verdicts([*(compare(folders, *row) for row in table.COMPARISONS), *table.more_claims(folders)])
