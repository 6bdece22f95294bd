"""Kills every training script at random moments, again and again, resumes it, and compares with a run left alone.

    python tests/fault.py --kills 20 [--only meta_rm.py]           by hand; about three minutes a script on two cores

A run is right if its metrics (but for the clock's), its model and all other files are the same, byte by byte.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RM = ["--data", "toy:n=1600", "--epochs", "4", "--eval-data", "id=toy:id,n=50", "--eval-every", "40"]
SAVE = [*RM, "--save-every", "15"]
SCRIPTS = {
    "baseline_rm.py": SAVE,
    "vote_strength.py": ["--data", "toy:n=400", "--members", "12", "--eval-data", "id=toy:id,n=50"],
    "denoise_rm.py": [*SAVE, "--smoothing", "0.2"],
    "contrastive_rm.py": [*SAVE, "--method", "swav"],
    "meta_rm.py": [*SAVE, "--meta-prompts", "100"],
    "ppo_loop.py": ["--data", "toy:n=400", "--rounds", "2", "--iterations", "20", "--save-every", "4",
                    "--eval-prompts", "20", "--eval-data", "id=toy:id,n=50", "--eval-every", "10", "--rm-flags",
                    "--epochs 1 --batch-size 32 --max-length 64 --meta-prompts 50 --max-new-tokens 12 --save-every 4"],
}
CLOCK = {"seconds", "train/pairs_per_sec", "ppo/rollout_seconds", "ppo/scoring_seconds", "ppo/update_seconds"}


def contents(folder):
    """All that a run leaves but the clock, {file: what it says}."""
    result = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or re.search(r"(^|/)checkpoint[-.]|\.tmp(/|$)", name):  # what a kill in the middle leaves
            continue
        if path.name == "metrics.jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            result[name] = [{key: x for key, x in line.items() if key not in CLOCK} for line in lines]
        elif path.name == "args.json":
            result[name] = sorted(json.loads(path.read_text()).keys() - {"output_dir", "resume", "data_hash"})
        elif path.name == "report.json":
            result[name] = {key: x for key, x in json.loads(path.read_text()).items() if key != "seconds"}
        else:
            result[name] = path.read_bytes()
    return result


def start(script, folder, *flags):
    command = [sys.executable, str(ROOT / script), *SCRIPTS[script], "--output-dir", str(folder), *flags]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process):
    _, error = process.communicate()
    if process.returncode:
        sys.exit(error)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=[*SCRIPTS], default=[*SCRIPTS])
    args = parser.parse_args()
    rng, wrong = random.Random(args.seed), 0
    for script in args.only:
        with tempfile.TemporaryDirectory() as folder:
            whole, broken = Path(folder) / "whole", Path(folder) / "broken"
            began = time.time()
            finish(start(script, whole))
            lasts, kills, done, moments = time.time() - began, 0, False, []
            while kills < args.kills:
                process = start(script, broken, "--resume")
                try:
                    process.wait(rng.uniform(0.2, 0.8) * lasts)
                    finish(process)  # it has ended: the next kill needs another run
                    done = contents(broken) == contents(whole)
                    wrong += not done
                    broken = broken.with_name(f"again-{kills}")
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
                    kills += 1
                    path = broken / "metrics.jsonl"
                    moments.append(len(path.read_text().splitlines()) if path.exists() else 0)
            finish(start(script, broken, "--resume"))
            ours, theirs = contents(broken), contents(whole)
            same = ours == theirs
            wrong += not same
            different = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
            print(f"{script}: a run takes {lasts:.0f} s; {kills} kills, after {moments} records; "
                  f"{'the same' if same else f'NOT THE SAME, {different},'} in the end", flush=True)
    sys.exit(wrong)
