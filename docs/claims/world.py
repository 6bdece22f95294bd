"""The toy world for other seeds and rates of noise, and what its experiments have in common."""

import itertools
import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
MODEL = "docs/toy/model"
sys.path.append(str(ROOT / "docs/toy"))
import make  # noqa: E402

TOY = "$dir/toy-0.1"  # the files of a seed with 10 % of the labels flipped, as in docs/toy
SETTING = (
    f"--model {MODEL} --data {TOY}/train.jsonl --batch-size 32 --lr 5e-4 --max-length 64 --epochs 3")
VOTE = f"vote_strength.py {SETTING} --seed $voter --eval-data noisy={TOY}/noisy.jsonl"
TRAIN = (
    f"{SETTING} --seed $seed --eval-every 0 --save-every 0 --eval-data id={TOY}/id.jsonl "
    f"ood={TOY}/ood.jsonl shifted={TOY}/shifted.jsonl noisy={TOY}/noisy.jsonl")


def make_world(folder, seed, flip):
    """Write the files of docs/toy for another seed, unless they are there, and three more: `wrong`,
    the training rows with wrong labels; `pairs`, all pairs of five nearly perfect responses to each
    of 100 prompts (Fig. 16); `random`, the SFT model's shape without training."""
    if (folder / "meta.jsonl").exists():
        return
    tokenizer = make.make_tokenizer()
    untrained = make.make_model(tokenizer, seed=seed, steps=0)
    untrained.save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")

    files = {}
    for split in ("train", "noisy", "id", "ood", "shifted"):
        files[split] = make.make_comparisons(split, None, seed, flip)
    files["wrong"] = [row for row in files["train"] if row["gold"] == 0]
    files["pairs"] = []
    rng = random.Random(f"pairs {seed}")
    for row in files["id"][:100]:
        prompt = row["prompt"]
        skills = [rng.uniform(0.8, 1) for _ in range(5)]
        responses = [make.make_response(rng, prompt, skill) for skill in skills]
        for chosen, rejected in itertools.combinations(responses, 2):
            files["pairs"].append({"prompt": prompt, "chosen": chosen, "rejected": rejected})

    torch.manual_seed(seed)
    policy = AutoModelForCausalLM.from_pretrained(ROOT / MODEL)
    prompts = [row["prompt"] for row in files["train"][:1000]]
    files["meta"] = make.sample(policy, tokenizer, prompts, 5)
    for name, rows in files.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
