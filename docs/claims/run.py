"""The experiments behind docs/results.md: the papers' claims, over seeds, by today's scripts.

    python docs/claims/run.py denoising --seeds 10 --jobs 2    runs what is missing, then measures
    python docs/claims/run.py denoising --jobs 0               measures what has been run
    python docs/tables.py docs/results.md README.md            fills in the tables of the pages

A run is a command line of one of the scripts, done once for each seed in runs/claims/<seed>/<run>.
A seed has its own comparisons, meta set, reward heads, data order and samples, but not its own SFT
model. Runs with numbers in docs/claims/results/<experiment>.json are not done again, so an
experiment can go on elsewhere with this file alone. Experiments on real text: real.py.

To add the claim that label smoothing beats the baseline after one epoch, write in denoising.py:

    RUNS["smooth-1"] = f"{VOTED} --label-smoothing 0.2 --epochs 1"
    BASES["smooth-1"] = "baseline-1"
    CLAIMS.append(Claim(
        figure="Fig. 8", text="Label smoothing beats the baseline after one epoch",
        key="eval/id/accuracy", larger="smooth-1", smaller="baseline-1"))

`run.py denoising --runs smooth-1` does this run, and those that it needs, for every seed. How a
verdict is found, and what shows it on a page: docs/tables.py.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import re
import runpy
import string
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch  # noqa: E402
import transformers  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
import common  # noqa: E402  imported once: a run is a fork of this process
import world  # noqa: E402
from measure import measure_claims, measure_runs, read_numbers  # noqa: E402
from tables import RESULTS, read_results, show_table  # noqa: E402


def describe_code():
    """The commit, "-dirty" with changes, the versions and the processor that a run uses."""
    commit = subprocess.getoutput(f"git -C {ROOT} describe --always --dirty --exclude '*'")
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return (f"commit {commit}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}, processor {processor}")


def run_script(words, path, code):
    """A script with its flags, as if started from a shell. What it prints goes to a file, and into
    made.json by which code it ran and for how many minutes of one core."""
    with open(f"{path}.log", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [*words, "--output-dir", str(path)]
    runpy.run_path(words[0], run_name="__main__")
    made = {"code": code, "minutes": time.process_time() / 60}
    (path / "made.json").write_text(json.dumps(made))


def run_once(name, command, folder, values):
    """One run of one seed, in a process of its own, unless its folder has made.json already."""
    path = folder / name
    if (path / "made.json").exists():
        return
    words = [string.Template(word).substitute(values) for word in command.split()]
    args = (words, path, describe_code())
    process = multiprocessing.get_context("fork").Process(target=run_script, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"error: run {name} failed, see {path}.log")
    print(f"{time.strftime('%H:%M')} {path}", flush=True)


def run_seed(runs, folder, flips=()):
    """The missing runs of a seed, one after the other, because they need each other. In a command,
    $dir is the folder of the seed, $seed its number and $voter the seed of its first voter."""
    os.chdir(ROOT)
    seed = int(folder.name)
    for flip in flips:
        world.make_world(folder / f"toy-{flip}", seed, flip)
    for name, command in runs.items():
        run_once(name, command, folder, {"dir": folder, "seed": seed, "voter": 10 * seed})


def read_old(name):
    """-> the results file of an experiment, if there is one."""
    path = RESULTS / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    return {"seeds": 0, "code": [], "numbers": {}}


def find_needed(runs, pattern, done):
    """The runs that match a regular expression and are not done, and those whose files they need."""
    needed = {}
    for name in reversed(runs):
        is_missing = re.fullmatch(pattern, name) and name not in done
        if is_missing or any(f"$dir/{name}/" in command for command in needed.values()):
            needed[name] = runs[name]
    return dict(reversed(needed.items()))


def run_missing(args, name, runs, folders, flips=()):
    """Do the runs that match --runs for the seeds that lack them in the results file."""
    numbers = read_old(name)["numbers"]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
        futures = []
        for folder in folders:
            done = {run for run in numbers if folder.name in numbers[run]["minutes"]}
            needed = find_needed(runs, args.runs, done)
            if needed:
                futures.append(pool.submit(run_seed, needed, folder, flips))
    for future in futures:
        future.result()


def save_results(name, experiment, folders, about):
    """Measure what has been run, write docs/claims/results/<name>.json and print the verdicts."""
    old = read_old(name)
    numbers = read_numbers(experiment, folders, old["numbers"])
    files = [folder / run / "made.json" for folder in folders for run in numbers]
    made = [json.loads(path.read_text()) for path in files if path.exists()]
    minutes = [x for run in numbers.values() for x in run["minutes"].values()]
    results = {
        "about": about, "seeds": max(len(folders), old["seeds"]), "hours": round(sum(minutes) / 60, 2),
        "code": sorted({*old["code"], *(x["code"] for x in made)}),
        "runs": measure_runs(experiment, numbers),
        "claims": measure_claims(experiment.CLAIMS, numbers), "numbers": numbers}
    text = json.dumps(results, indent=1)
    for part in re.findall(r"{[^{}]*}", text):  # a line for each number
        text = text.replace(part, " ".join(part.split()))
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(show_table(read_results(name), "claims"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["denoising", "generalisation", "ppo"])
    parser.add_argument("--seeds", type=common.in_range(int, 2), default=10)
    parser.add_argument("--jobs", type=int, default=1, help="processes; 0: only measure")
    parser.add_argument("--runs", default=".*", help="regular expression for their names")
    args = parser.parse_args()

    experiment = importlib.import_module(args.experiment)
    folders = [ROOT / f"runs/claims/{seed}" for seed in range(args.seeds)]
    if args.jobs:
        run_missing(args, args.experiment, experiment.RUNS, folders, experiment.FLIPS)
    save_results(args.experiment, experiment, folders, "toy world")
