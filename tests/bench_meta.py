"""What the meta step of meta_rm.py costs: its steps beside those of baseline_rm.py, the meta batch being comparisons of
the same 200, as many.

    python tests/bench_meta.py [--data FILE] [--hidden 512 --layers 6] [--rounds 3]

The scripts take turns. Prints the medians of the seconds of a step, without the first two, and their ratio.
"""

import argparse
import contextlib
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def seconds(script, *flags):
    """Seconds of each step but the first two."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
        sys.argv = [script, "--output-dir", f"{folder}/run", *map(str, flags)]
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        lines = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
    size = int(flags[flags.index("--batch-size") + 1])
    return [size / line["train/pairs_per_sec"] for line in lines][2:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="toy")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-tokens", type=int, default=8192 if torch.cuda.is_available() else 1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="in which the two take turns")
    args = parser.parse_args()

    import common
    import transformers
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaConfig(
            vocab_size=8192, hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_attention_heads=8,
            num_hidden_layers=args.layers).to_json_file(f"{folder}/model.json")
        rows = [(prompt, answers) for prompt, answers in map(common.read_row, common.load_rows(args.data).take(200))
                if prompt and answers[0] != answers[1]]
        for name in ("data", "meta"):
            with open(f"{folder}/{name}.jsonl", "w") as file:
                file.writelines(json.dumps({"prompt": prompt, "responses": answers} if name == "meta" else {
                    "prompt": prompt, "chosen": answers[0], "rejected": answers[1]}) + "\n" for prompt, answers in rows)
        flags = ["--model", f"{folder}/model.json", "--data", f"{folder}/data.jsonl", "--eval-data", "--batch-size",
                 args.batch_size,
                 "--epochs", args.steps * args.batch_size / len(rows), "--max-length", 512, "--micro-tokens",
                 args.micro_tokens, "--save-every", 0, "--lr", 1e-5, "--eval-every", 0]
        meta = ["--meta-data", f"{folder}/meta.jsonl", "--meta-batch-size", args.batch_size]
        times = {"baseline_rm.py": [], "meta_rm.py": []}
        for _ in range(args.rounds):
            times["baseline_rm.py"] += seconds("baseline_rm.py", *flags)
            times["meta_rm.py"] += seconds("meta_rm.py", *flags, *meta, "--eta", 5e-6)
    plain, both = (np.median(values) for values in times.values())
    print(f"baseline_rm.py {plain:.3f} s, meta_rm.py {both:.3f} s a step: {both / plain:.2f} times")
