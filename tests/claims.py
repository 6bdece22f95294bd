"""The experiments behind the README's tables on voting and denoising, in the toy world, with the scripts as they are.

    python tests/claims.py --jobs 2          run what is missing under runs/claims, then print the tables as Markdown

Every seed draws new comparisons, for training and for evaluation, and new reward models. A table's +/- is the 95 %
interval of a mean over the seeds (Student's t), of a difference to the baseline the interval of the paired difference.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import numpy as np

ROOT, RUNS = Path(__file__).resolve().parents[1], Path("runs/claims")
NOISE = 0.1, 0.0, 0.25, 0.4  # shares of labels turned around; the first is the toy world's own
METHODS = {
    "baseline": "",
    "margin": "--margin",
    "flip 10 %": "--flip 0.1",
    "flip 10 %, margin": "--flip 0.1 --margin",
    "soft label + margin, S1": "--margin --smoothing 0.2 --smooth-on negative",
    "soft label + margin, S2": "--margin --smoothing 0.2",
    "soft targets, S3": "--soft-targets 1",
    "drop 10 %": "--drop 0.1",
    "flip 25 %": "--flip 0.25",
    "drop 25 %": "--drop 0.25",
    "smoothing 0.2": "--smoothing 0.2",
    "unbiased, rate 0.2": "--noise-rate 0.2",
}
FIGURE_8 = "baseline", "margin", "flip 10 %", "flip 10 %, margin", "soft label + margin, S1", "soft targets, S3"
LONG = 8
EPOCHS = {1: [*FIGURE_8, "drop 10 %"], 4: [*METHODS]}
TOO_MUCH = (1, "margin"), (1, "flip 10 %, margin"), (4, "soft label + margin, S2")  # not run at other rates of noise
DECILES = {f"decile {low}": f"--percentiles {low} {low + 10}" for low in range(0, 100, 10)}
DECILES |= {f"decile {low}, flipped": f"--percentiles {low} {low + 10} --flip 1" for low in (0, 10)}
STRONGEST = {"none": "", "margin": "--margin", "soft": "--smoothing 0.2", "both": "--margin --smoothing 0.2"}
STRONGEST = {f"strongest, {name}": f"--percentiles 90 100 {flags}" for name, flags in STRONGEST.items()}


def run(script, folder, done, *flags):
    """Run a script in this process, unless its folder holds `done` already."""
    if (folder / done).exists():
        return
    sys.argv = [script, "--output-dir", str(folder), *flags]
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def cells(noise):
    """The denoising runs at one rate of noise: {name: flags}."""
    runs = {f"{name}, {epochs} epochs": f"{METHODS[name]} --epochs {epochs}"
            for epochs, names in EPOCHS.items() for name in names
            if noise == NOISE[0] or (epochs, name) not in TOO_MUCH}
    if noise == NOISE[0]:
        runs |= {f"{name}, {LONG} epochs": f"{METHODS[name]} --epochs {LONG}" for name in FIGURE_8}
        # a tenth of the data: more epochs, and a third to two thirds of the steps of the full runs' 3
        runs |= {name: f"{flags} --epochs 8" for name, flags in DECILES.items()}
        runs |= {name: f"{flags} --epochs 16" for name, flags in STRONGEST.items()}
    return runs


def work(seed, noise, only=None):
    """All runs of one seed at one rate of noise, or those that are named in `only`."""
    import torch
    torch.set_num_threads(1)  # the toy model is too small for two
    sys.path.insert(0, str(ROOT))
    data, folder = f"toy:seed={seed},flip={noise}", RUNS / f"{noise}/{seed}"
    noisy = f"noisy=toy:noisy,seed={seed},flip={noise}"
    votes = ["--data", data, "--seed", str(10 * seed), "--eval-data", noisy]
    run("vote_strength.py", folder / "vote", "report.json", *votes)
    if noise == NOISE[0] and not only:
        run("vote_strength.py", folder / "cross", "report.json", *votes, "--cross-fit", "2")
    sets = [f"{name}=toy:{name},seed={seed}" for name in ("id", "ood", "shifted") if name == "id" or noise == NOISE[0]]
    sets += [f"voted={folder}/vote/train.jsonl"] * (noise == NOISE[0])
    for name, flags in cells(noise).items():
        if only and name not in only:
            continue
        asks = any(word in flags for word in ("margin", "flip", "drop", "soft", "percentiles"))
        strength = ["--strength", f"{folder}/vote/train.jsonl"] * asks
        run("denoise_rm.py", folder / name, "model", "--data", data, *strength, "--eval-data", *sets,
            f"noisy={folder}/vote/noisy.jsonl", "--seed", str(seed), "--eval-every", "0", "--save-every", "0",
            *flags.split())


# --------------------------------------------------------------------------------------------------------- results
@functools.cache
def last_record(path):
    return json.loads(path.read_text().splitlines()[-1])


def metric(noise, name, key, seeds):
    """eval/<key> at the end of a run, over the seeds (S,)."""
    paths = [RUNS / f"{noise}/{seed}/{name}/metrics.jsonl" for seed in range(seeds)]
    return np.array([last_record(path)[f"eval/{key}"] for path in paths])


def voted(noise, seeds, name="vote"):
    """The training rows by strength, weakest first: mean, std, and gold label (1, 0, -1), each (S, N)."""
    columns = [], [], []
    for seed in range(seeds):
        rows = [json.loads(line) for line in (RUNS / f"{noise}/{seed}/{name}/train.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["mean preference difference"] is not None]
        rows.sort(key=lambda row: row["mean preference difference"])
        for column, key in zip(columns, ("mean preference difference", "std preference difference", "gold")):
            column.append([row[key] for row in rows])
    least = min(map(len, columns[0]))  # a row or two are dropped in some seeds
    return [np.array([values[:least] for values in column]) for column in columns]


def interval(values):
    """Values of the seeds -> mean and half of its 95 % interval (Student's t, its quantile by Hill's expansion)."""
    n, z = len(values), 1.959964
    t = z + (z**3 + z) / (4 * (n - 1)) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * (n - 1) ** 2)
    return np.mean(values), t * np.std(values, ddof=1) / math.sqrt(n)


def show(values, scale=100, digits=1, sign=""):
    mean, half = interval(values)
    return f"{scale * mean:{sign}.{digits}f} ± {scale * half:.{digits}f}"


def spell(epochs):
    return f"{epochs} epoch{'s' * (epochs > 1)}"


def table(*rows):
    """A Markdown table; the first row is its head."""
    print("\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])), end="\n\n")


def tables(seeds):
    """Print everything but the verdicts."""
    get = functools.partial(metric, seeds=seeds)
    first = NOISE[0]
    mean, std, gold = voted(first, seeds)
    tenths = [np.array_split(x, 10, axis=1) for x in (mean, std, gold == 0, gold == -1)]
    table(["strength", "mean", "std", "wrong labels, %", "gold has no preference, %"],
          *([f"{10 * i} to {10 * i + 10} %", *(show(x[i].mean(1), 1, 2) for x in tenths[:2]),
             *(show(x[i].mean(1)) for x in tenths[2:])] for i in range(10)))

    rows = []
    for noise, name in [*((noise, "vote") for noise in sorted(NOISE)), (first, "cross")]:
        mean, _, gold = voted(noise, seeds, name)
        wrong, tenth = gold == 0, mean.shape[1] // 10
        rows.append([f"{noise:.0%}" + ", cross-fitted" * (name == "cross"), *map(show, (
            wrong.mean(1), (mean < 0).mean(1), wrong[:, :tenth].mean(1),
            (wrong & (mean < 0)).sum(1) / (mean < 0).sum(1), (wrong & (mean < 0)).sum(1) / wrong.sum(1)))])
    table(["labels turned around", "wrong labels, %", "strength < 0, %", "wrong in the weakest tenth, %",
           "wrong where strength < 0, %", "of the wrong labels, found by strength < 0, %"], *rows)

    keys = "noisy/accuracy", "id/accuracy", "ood/accuracy"
    heads = ["accuracy: annotators' labels, %", "gold, %", "gold, two kinds, %", "loss, annotators' labels"]
    for names in (DECILES, STRONGEST):
        table(["trained on", *heads], *([name, *(show(get(first, name, key)) for key in keys),
                                         show(get(first, name, "noisy/loss"), 1, 2)] for name in names))

    for epochs, names in EPOCHS.items():
        base = {noise: get(noise, f"baseline, {epochs} epochs", "id/accuracy") for noise in NOISE}
        table([f"{spell(epochs)}; labels turned around:", *(f"{noise:.0%}" for noise in sorted(NOISE))],
              ["baseline", *(show(base[noise]) for noise in sorted(NOISE))],
              *([name, *(show(get(noise, f"{name}, {epochs} epochs", "id/accuracy") - base[noise], sign="+")
                         for noise in sorted(NOISE))] for name in names[1:] if (epochs, name) not in TOO_MUCH))

    keys = "noisy/accuracy", "noisy/accuracy_second", "noisy/accuracy_agreeing", "ood/accuracy", "shifted/accuracy"
    for epochs, names in ((4, METHODS), (LONG, FIGURE_8)):
        base = {key: get(first, f"baseline, {epochs} epochs", key) for key in keys}
        table([spell(epochs), "annotators' labels", "gold", "both agree", "ood", "shifted", "loss, annotators'"],
              *([name, *(show(get(first, f"{name}, {epochs} epochs", key) - (0 if name == "baseline" else base[key]),
                              sign="" if name == "baseline" else "+") for key in keys),
                 show(get(first, f"{name}, {epochs} epochs", "noisy/loss"), 1, 2)] for name in names))


def claims(seeds):
    """Print a verdict for each claim: a quantity that the claim says is above 0, and its interval over the seeds."""
    get, first = functools.partial(metric, seeds=seeds), NOISE[0]
    original, second, loss = "noisy/accuracy", "noisy/accuracy_second", "noisy/loss"

    def full(name, key=original, epochs=4, noise=first):
        return get(noise, f"{name}, {epochs} epochs", key)

    def decile(low, flipped="", key=original):
        return get(first, f"decile {low}{flipped}", key)

    def strongest(name, key=original):
        return get(first, f"strongest, {name}", key)

    def segments(name):  # (20, S)
        return np.array([full(name, f"noisy/accuracy_segment_{i:02}") for i in range(1, 21)])

    def repeated(name, epochs):  # which share of the wrong labels that it was trained on (S,)
        wrong, right = (gold == 0).mean(1), (gold == 1).mean(1)
        by_gold, agreeing = (full(name, f"voted/accuracy_{key}", epochs) for key in ("second", "agreeing"))
        return 1 - (by_gold * (wrong + right) - agreeing * right) / wrong

    mean, std, gold = voted(first, seeds)
    std = np.array([part.mean(1) for part in np.array_split(std, 20, axis=1)])
    agreement = np.array([(part == 1).sum(1) / (part >= 0).sum(1) for part in np.array_split(gold, 20, axis=1)])
    near = np.argsort(abs(mean), axis=1)[:, : mean.shape[1] // 20]  # the twentieth nearest to strength 0
    near = np.take_along_axis(gold, near, axis=1)
    decided, ties = (near == 1).sum(1) / (near >= 0).sum(1), (near < 0).mean(1)
    cross = voted(first, seeds, "cross")[2]
    tenth = mean.shape[1] // 10
    flip = segments("flip 10 %") - segments("baseline")
    points, plain = (100, 1, "points"), (1, 2, "")
    rows = [
        ("Fig. 3", "most labels of the weakest twentieth are wrong: 0.5 - agreement", 0.5 - agreement[0], points),
        ("Fig. 3", "of the strongest twentieth hardly any: agreement - 0.95", agreement[-1] - 0.95, points),
        ("Fig. 3", "at strength 0 labels are a coin's: 0.6 - agreement", 0.6 - decided, points),
        ("Fig. 3", "so with a judge who must choose, by a coin where gold has no preference",
         0.6 - decided * (1 - ties) - ties / 2, points),
        ("Fig. 2", "std is U-shaped: weakest twentieth - 20 to 40 %", std[0] - std[4:8].mean(0), plain),
        ("Fig. 2", "strongest twentieth - 20 to 40 %", std[-1] - std[4:8].mean(0), plain),
        ("Fig. 4", "trained on 0 to 10 %: 0.5 - accuracy", 0.5 - decile(0), points),
        ("Fig. 4", "trained on 10 to 20 %: 0.5 - accuracy", 0.5 - decile(10), points),
        ("Fig. 4", "20 to 40 % about chance: 0.55 - accuracy", 0.55 - (decile(20) + decile(30)) / 2, points),
        ("Fig. 4", "the strongest tenth is not the best: 60 to 80 % - 90 to 100 %",
         (decile(60) + decile(70)) / 2 - decile(90), points),
        ("Fig. 5", "0 to 10 % flipped: accuracy - 0.5", decile(0, ", flipped") - 0.5, points),
        ("Fig. 5", "10 to 20 % flipped: accuracy - 0.5", decile(10, ", flipped") - 0.5, points),
        ("Fig. 6", "strongest tenth: margin - none", strongest("margin") - strongest("none"), points),
        ("Fig. 6", "soft - none", strongest("soft") - strongest("none"), points),
        ("Fig. 6", "both - soft", strongest("both") - strongest("soft"), points),
        ("Fig. 6", "validation loss: none - soft", strongest("none", loss) - strongest("soft", loss), plain),
        ("Fig. 7", f"margin on all data, {LONG} epochs: margin - baseline",
         full("margin", epochs=LONG) - full("baseline", epochs=LONG), points),
        ("Fig. 8", f"the baseline falls with time: 4 - {LONG} epochs",
         full("baseline") - full("baseline", epochs=LONG), points),
        ("Fig. 8", f"and by gold more than flip 10 %: difference of 4 - {LONG} epochs",
         full("baseline", second) - full("baseline", second, LONG)
         - full("flip 10 %", second) + full("flip 10 %", second, LONG), points),
    ]
    for epochs in (1, 4, LONG):
        rows += [("Fig. 8", f"gold labels, {spell(epochs)}: {name} - baseline",
                  full(name, second, epochs) - full("baseline", second, epochs), points) for name in FIGURE_8[1:]]
    rows += [
        ("Fig. 8", "original labels, 4 epochs: S1 - baseline", full(FIGURE_8[4]) - full("baseline"), points),
        ("Fig. 8", "original labels, 4 epochs: S3 - baseline", full(FIGURE_8[5]) - full("baseline"), points),
        ("Fig. 8", "gold labels, 4 epochs: flip 10 %, margin - S1",
         full(FIGURE_8[3], second) - full(FIGURE_8[4], second), points),
        ("Fig. 8", "loss on original labels, 4 epochs: flip 10 % - baseline",
         full("flip 10 %", loss) - full("baseline", loss), plain),
        ("Fig. 8", f"loss on original labels, {LONG} epochs: baseline - S1",
         full("baseline", loss, LONG) - full(FIGURE_8[4], loss, LONG), plain),
        ("Fig. 8", f"loss on original labels, {LONG} epochs: baseline - S3",
         full("baseline", loss, LONG) - full(FIGURE_8[5], loss, LONG), plain),
        ("Fig. 27", "methods differ most on weak segments: abs(flip 10 % - baseline), weaker - stronger half",
         abs(flip[:10]).mean(0) - abs(flip[10:]).mean(0), points),
        ("Fig. 28", "flip 10 % learns less of the wrong: baseline - flip 10 %, weakest quarter",
         -flip[:5].mean(0), points),
        ("Fig. 28", "and does better on the rest: flip 10 % - baseline", flip[5:].mean(0), points),
    ]
    rows += [("Fig. 28", f"of the wrong labels trained on, {name} repeats fewer: baseline - {name}, {spell(epochs)}",
              repeated("baseline", epochs) - repeated(name, epochs), points)
             for name, epochs in (("flip 10 %", 4), ("flip 10 %", 1), ("soft targets, S3", 1))]
    for share in (10, 25):
        rows += [("2509.23564", f"drop {share} % - flip {share} %, gold, 4 epochs, {noise:.0%} turned around",
                  np.subtract(*(full(f"{way} {share} %", "id/accuracy", noise=noise) for way in ("drop", "flip"))),
                  points) for noise in sorted(NOISE)]
    rows += [
        ("2410.18451", "margins do not help on clean labels: baseline - margin, gold, 4 epochs, 0% turned around",
         full("baseline", "id/accuracy", noise=0.0) - full("margin", "id/accuracy", noise=0.0), points),
        ("ours", "cross-fitting finds more: wrong labels in the weakest tenth, cross-fitted - not",
         (cross == 0)[:, :tenth].mean(1) - (gold == 0)[:, :tenth].mean(1), points),
    ]
    table(["paper", "above 0, if the claim holds", "measured", "verdict"], *(
        [source, text, f"{show(values, scale, digits, '+')} {unit}".strip(), verdict(values, 0.005 * (scale == 100))]
        for source, text, values, (scale, digits, unit) in rows))


def verdict(values, little):
    """Seen: the interval lies above 0. Not seen: it lies below `little` (half a point of accuracy). Else undecided."""
    mean, half = interval(values)
    return "seen" if mean - half > 0 else "not seen" if mean + half < little else "undecided"


def over_seeds(doc, work, seeds=10, cells=((),)):
    """Read --seeds and --jobs, call work(seed, *cell) for each seed and cell in processes, -> how many seeds."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(work, seed, *cell) for seed, cell in itertools.product(range(args.seeds), cells)]
        for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
            future.result()
            print(f"{number} of {len(futures)}", file=sys.stderr)
    return args.seeds


if __name__ == "__main__":
    seeds = over_seeds(__doc__, work, cells=[(noise,) for noise in NOISE])
    tables(seeds)
    claims(seeds)
