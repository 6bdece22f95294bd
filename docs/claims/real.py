"""The papers' claims on real text: every method on a language model of your choice. run.py explains the verdicts.

    python docs/claims/real.py --model SmolLM2-135M-Instruct --data helpful_train.jsonl --seeds 10 \\
        --eval-data helpful=helpful_test.jsonl harmless=harmless_test.jsonl
    python docs/claims/real.py --size 128x3 --lr 5e-4 --iterations 0 ...    a small model, first trained on --data

The first set of --eval-data is in distribution, the others are not. Votes, the model's samples and the judge are made
once, in <output-dir>/shared. A seed has its own reward heads, data order and PPO samples, in <output-dir>/<seed>. As in
run.py, a cell is a command line of one of the scripts, and finished cells are skipped. Intervals are over the seeds;
the comparisons are the same for all.

There is no gold reward here, so the second half of --data trains only a judge, a reward model that compares the
policies. With --iterations 0 there is neither PPO nor a judge, and all of --data trains the methods.
"""

import argparse
import json
import math
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
    "margin": "--margin", "flip": "--flip 0.1", "S1": "--margin --label-smoothing 0.2 --smooth-on negative",
    "S3": "--soft-targets 1", "decile-0": "--percentiles 0 10 --epochs 4",  # a tenth of the data, so more epochs
    "decile-50": "--percentiles 50 60 --epochs 4", "decile-90": "--percentiles 90 100 --epochs 4",
    "decile-0-flipped": "--percentiles 0 10 --epochs 4 --flip 1"}
META = {"meta-0": "--eta 0", "meta-5e-6": "--eta 5e-6"}
for eta in ("1e-3", "1e-2", "1e-1"):
    META[f"meta-{eta}"] = f"--eta {eta} --ascent normalized"
    META[f"alternate-{eta}"] = f"--eta {eta} --ascent normalized --update alternate"
POLICIES = {}
for name in ("baseline", "S3", "simcse"):
    POLICIES[f"free-{name}"] = f"--kl-coef 0 --reward-model {{dir}}/{name}/model"
    POLICIES[f"held-{name}"] = f"--kl-coef 0.05 --reward-model {{dir}}/{name}/model"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or hub id of a language model")
    add("--size", help="instead of --model: hidden size x layers of a Llama to train on --data and --text")
    add("--text", nargs="*", default=[], help="more comparisons, which only the model of --size is trained on")
    add("--data", required=True, help="comparisons, as in the scripts")
    add("--eval-data", nargs="+", type=common.named_source, required=True, metavar="NAME=SOURCE")
    add("--output-dir", type=Path, default=Path("runs/real"))
    add("--pairs", type=int, help="number of rows to use of each file (default: all)")
    add("--seeds", type=int, default=10, help="number of seeds, 2 or more for intervals (default: 10)")
    add("--jobs", type=int, default=1, help="processes; 0: only print (default: 1)")
    add("--cells", default=".*", help="run only those whose names match this regular expression")
    add("--members", type=int, default=10, help="voters (default: 10)")
    add("--lr", default="2e-5", help="of the reward models (default: 2e-5)")
    add("--max-length", type=int, default=512, help="of prompt plus response in tokens (default: 512)")
    add("--iterations", type=int, default=100, help="of PPO (default: 100)")
    add("--ppo-lr", type=float, default=5e-6, help="of the policies (default: 5e-6); three times that for the critics")
    return parser.parse_args()


def as_messages(prompt, responses):
    """A transcript and its responses -> lists of messages, which go through the model's chat template."""
    parts = re.split(r"\n\n(Human|Assistant):", prompt)[1:-2]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[speaker], "content": text.strip()} for speaker, text in zip(parts[::2], parts[1::2])]
    return turns, [[{"role": "assistant", "content": text.strip()}] for text in responses]


def write_data(args, folder):
    """Write train.jsonl, judge.jsonl and a file for each set, as conversations if the model has a chat template."""
    is_chat = transformers.AutoTokenizer.from_pretrained(args.model).chat_template is not None
    for name, source in (*args.eval_data, ("train", args.data)):
        rows, lines = common.load_rows(source, "train" if name == "train" else "test"), []
        for row in rows.take(min(args.pairs or len(rows), len(rows))):
            prompt, responses = common.read_row(row)
            if is_chat:
                prompt, responses = as_messages(prompt, responses)
            lines.append(json.dumps({"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}) + "\n")
        if name == "train" and args.iterations:
            (folder / "judge.jsonl").write_text("".join(lines[len(lines) // 2 :]))
            lines = lines[: len(lines) // 2]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def make_model(folder, args):
    """A Llama with a BPE of 8,192 tokens, trained for one pass over the chosen texts of --data and --text."""
    texts = {}  # a dictionary keeps the order and drops repetitions
    for source in (args.data, *args.text):
        for row in common.load_rows(source):
            prompt, responses = common.read_row(row)
            texts[prompt + responses[0]] = None
    tokenizer = transformers.GPT2Tokenizer(pad_token="<pad>").train_new_from_iterator(texts, 8192)
    hidden_size, num_layers = map(int, args.size.split("x"))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=8192, hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_attention_heads=4,
        num_hidden_layers=num_layers, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id))
    tokens = np.concatenate([[*ids[:1024], tokenizer.eos_token_id] for ids in tokenizer(list(texts)).input_ids])
    blocks = torch.tensor(tokens[: len(tokens) // 2048 * 2048]).view(-1, 8, 256)  # (steps, 8, 256)
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
    sets = " ".join(f"{name}={{dir}}/../shared/{name}.jsonl" for name, _ in args.eval_data)
    model = f"--model {{model}} --max-length {args.max_length}"
    train = f"{model} --lr {args.lr} --batch-size 32 --data {{dir}}/../shared/train.jsonl"
    once = "--eval-every 0 --save-every 0"  # evaluate at the end, no checkpoints
    shared = {"vote": f"vote_strength.py {train} --members {args.members} --eval-data"}
    sample = f"ppo_loop.py {model} --data {{dir}}/train.jsonl --max-new-tokens 64 --iterations 0"
    shared["meta"] = f"{sample} --num-samples 1000 --k 4"
    rm = f"{train} --seed {{seed}} {once} --eval-data {sets}"
    cells = {"baseline": f"baseline_rm.py {rm}"}
    for name, flags in DENOISE.items():
        cells[name] = f"denoise_rm.py {rm} --data {{dir}}/../shared/vote/train.jsonl {flags}"
    for name in ("simcse", "swav"):
        cells[name] = f"contrastive_rm.py {rm} --method {name}"
    for name, flags in META.items():
        cells[name] = f"meta_rm.py {rm} --meta-data {{dir}}/../shared/meta/samples.jsonl {flags}"
    cells["features"] = (
        f"eval.py --max-length {args.max_length} --eval-data {sets} --reward-models "
        + " ".join(f"{name}={{dir}}/{name}/model" for name in ("baseline", "simcse", "swav")))
    if args.iterations:
        shared["sft"] = f"{sample} --num-samples 200 --k 1"
        shared["judge"] = f"baseline_rm.py {train} --data {{dir}}/judge.jsonl --seed 1000 {once} --eval-data"
        ppo = (f"ppo_loop.py {model} --data {{dir}}/../shared/train.jsonl --seed {{seed}} {once} --lr {args.ppo_lr} "
               f"--critic-lr {3 * args.ppo_lr} --iterations {args.iterations} --batch-size 16 --max-new-tokens 64 "
               f"--num-samples 200 --k 1 --eval-data {sets.split()[0]}")
        for name, flags in POLICIES.items():
            cells[name] = f"{ppo} {flags}"
        files = {name: f"{{dir}}/{name}/samples.jsonl" for name in POLICIES}
        files["sft"] = "{dir}/../shared/sft/samples.jsonl"
        judge = f"eval.py --judge {{dir}}/../shared/judge/model --max-length {args.max_length} --policies"
        for first in ("sft", "free-baseline", "held-baseline"):
            others = [name for name in POLICIES if first == "sft" or name != first and name[:4] == first[:4]]
            cells[f"against-{first}"] = " ".join([judge, *(f"{name}={files[name]}" for name in (first, *others))])
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


def print_results(args, folders, cells):
    names = [name for name, _ in args.eval_data]
    test, keys = f"eval/{names[0]}/accuracy", [f"eval/{name}/accuracy" for name in names]
    models = [name for name in cells if cells[name].split()[0] not in ("ppo_loop.py", "eval.py")]
    print_cells(folders, "reward models", models, [*keys, f"eval/{names[0]}/loss"], "baseline")
    print_cells(folders, "features", ["baseline", "simcse", "swav"], [f"{name}/overlap" for name in names])
    print_cells(folders, "MetaRM", META, ["mean/train/shift", "mean/train/update", "eval/meta/difference"])

    def elsewhere(name):
        return np.mean([compare(folders, "", name, "baseline", key)[2] for key in keys[1:] or keys], axis=0)

    claims = [("Fig. 4", 0.5, "decile-0", test), ("Fig. 5", "decile-0-flipped", 0.5, test)]
    claims += [("Fig. 8", name, "baseline", test) for name in ("margin", "flip", "S1", "S3")]
    claims += [("section 3.1", name, "baseline", test) for name in ("simcse", "swav")]
    claims += [("Fig. 11", "baseline", "simcse", f"{name}/overlap") for name in names]
    claims += [("Fig. 16", name, "meta-0", "eval/meta/difference") for name in META if name != "meta-0"]
    claims = [compare(folders, *claim) for claim in claims]
    for name in [name for name in META if name != "meta-0"]:
        claims += [("MetaRM Table 1", f"mean accuracy on the other sets: {name} - baseline", elsewhere(name), 100),
                   ("MetaRM Fig. 4", f"{test}: {name} - baseline + half a point",
                    compare(folders, "", name, "baseline", test)[2] + 0.005, 100)]
    if args.iterations:
        rows = [[name, *(show(read_metric(folders, name, f"ppo/{key}")) for key in ("kl", "score", "length")),
                 show(net_wins(folders, name, "sft"))] for name in POLICIES]
        print_table(["policies", "KL", "score", "length", "win - lose against the SFT model"], rows)
        for figure, policy, against in (
                ("section 2.5", "held-baseline", "sft"), ("Fig. 9", "free-S3", "free-baseline"),
                ("Fig. 12", "free-simcse", "free-baseline"), ("Fig. 13", "held-simcse", "held-baseline")):
            text = f"win - lose by the judge: {policy} against {against}"
            claims.append((figure, text, net_wins(folders, policy, against), 1))
    print_verdicts(claims)


if __name__ == "__main__":
    args = parse_args()
    output = args.output_dir.resolve()
    shared, folders = output / "shared", [output / str(seed) for seed in range(args.seeds)]
    for folder in (shared, *folders):
        folder.mkdir(parents=True, exist_ok=True)
    if args.size:
        args.model = str(shared / "model")
        if not (shared / "model/tokenizer.json").exists():
            make_model(shared / "model", args)
    elif Path(args.model).exists():
        args.model = str(Path(args.model).resolve())
    if not (shared / "train.jsonl").exists():
        write_data(args, shared)
    shared_cells, cells = make_cells(args)
    if args.jobs:
        run_missing(shared_cells, args.cells, [shared], args.model, args.jobs)
        run_missing(cells, args.cells, folders, args.model, args.jobs)
    strength = [row["mean preference difference"] for row in read_lines(shared / "vote/train.jsonl")]
    print(f"strength < 0 in {np.mean(np.less([x for x in strength if x is not None], 0)):.1%} of the training pairs\n")
    print_results(args, folders, cells)
