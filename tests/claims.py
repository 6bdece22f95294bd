"""The experiments behind the README's tables on voting and denoising, in the toy world, with the scripts as they are.

    python tests/claims.py --jobs 2          run what is missing under runs/claims, then print the tables as Markdown

Every seed draws new comparisons, for training and for evaluation, and new reward models. A table's +/- is the 95 %
interval of a mean over the seeds (Student's t), of a difference to the baseline the interval of the paired difference.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
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
EPOCHS = 1, 4
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
    runs = {f"{name}, {epochs} epochs": f"{flags} --epochs {epochs}"
            for name, flags in METHODS.items() for epochs in EPOCHS}
    if noise == NOISE[0]:  # a tenth of the data takes ten times the epochs for as many steps
        runs |= {name: f"{flags} --epochs 8" for name, flags in DECILES.items()}
        runs |= {name: f"{flags} --epochs 16" for name, flags in STRONGEST.items()}
    return runs


def work(seed, noise):
    """All runs of one seed at one rate of noise."""
    import torch
    torch.set_num_threads(1)  # the toy model is too small for two
    sys.path.insert(0, str(ROOT))
    data, folder = f"toy:seed={seed},flip={noise}", RUNS / f"{noise}/{seed}"
    noisy = f"noisy=toy:noisy,seed={seed},flip={noise}"
    votes = ["--data", data, "--seed", str(10 * seed), "--eval-data", noisy]
    run("vote_strength.py", folder / "vote", "report.json", *votes)
    if noise == NOISE[0]:
        run("vote_strength.py", folder / "cross", "report.json", *votes, "--cross-fit", "2")
    sets = [f"{name}=toy:{name},seed={seed}" for name in ("id", "ood", "shifted")]
    for name, flags in cells(noise).items():
        run("denoise_rm.py", folder / name, "model", "--data", data, "--strength", f"{folder}/vote/train.jsonl",
            "--eval-data", *sets, f"noisy={folder}/vote/noisy.jsonl", "--seed", str(seed), "--eval-every", "0",
            "--save-every", "0", *flags.split())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context) as pool:
        futures = [pool.submit(work, seed, noise) for seed, noise in itertools.product(range(args.seeds), NOISE)]
        for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
            future.result()
            print(f"{number} of {len(futures)}", file=sys.stderr)
