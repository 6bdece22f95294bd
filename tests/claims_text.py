"""The experiment behind the README's table on real text: a small language model, then every method on top of it.

    python tests/claims_text.py --data helpful_train.jsonl.gz --text harmless_train.jsonl.gz --eval-data
        helpful=helpful_test.jsonl.gz harmless=harmless_test.jsonl.gz --jobs 2

Trains a BPE and a Llama on the texts once, voters on the comparisons once, and every reward model with several seeds;
then prints the table. Everything lies under runs/claims_text, and what is there is not done again: another --data gets
other voters and reward models on the same language model.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np

from claims import ROOT, run, show, table

RUNS = Path("runs/claims_text")
METHODS = {
    "baseline": "baseline_rm.py",
    "flip 10 %, margin": "denoise_rm.py --flip 0.1 --margin",
    "soft targets, S3": "denoise_rm.py --soft-targets 1",
    "SimCSE": "contrastive_rm.py --method simcse",
    "SwAV": "contrastive_rm.py --method swav",
    "MetaRM": "meta_rm.py --eta 0.01 --ascent normalized",
}


def language_model(args):
    """A Llama of a million weights or so without its embeddings, trained on all texts once."""
    import datasets
    import torch
    import transformers
    from tqdm.auto import tqdm

    import common
    rows = datasets.concatenate_datasets(
        [common.load_rows(path).select_columns(["prompt", "chosen", "rejected"]) for path in [args.data, *args.text]])
    tokenizer = common.train_bpe(rows, 8192)
    texts = list(dict.fromkeys(prompt + chosen for prompt, (chosen, _) in map(common.read_row, rows)))
    stream = np.concatenate([ids[:1024] for ids in common.encode(texts, tokenizer)])
    blocks = torch.tensor(stream[: len(stream) // 256 * 256].reshape(-1, 256))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_attention_heads=4,
        num_hidden_layers=args.layers, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=1, eos_token_id=2))
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1), len(blocks) // 8
    order, losses = torch.randperm(len(blocks)), []
    for step in tqdm(range(steps), "language model", mininterval=20):
        optimizer.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 50, 1 - step / steps)
        batch = blocks[order[8 * step : 8 * step + 8]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{len(stream):,} tokens of {len(texts):,} texts; loss {losses[0]:.2f} to {np.mean(losses[-50:]):.2f}")
    model.save_pretrained(RUNS / "sft")
    tokenizer.save_pretrained(RUNS / "sft")


def folder(args):
    """What is trained on these comparisons lies here."""
    return RUNS / Path(args.data).name.split(".")[0]


def work(job):
    """One reward model, (seed, name), or the voters, (None, None)."""
    import torch
    torch.set_num_threads(1)  # the model is too small for two
    sys.path.insert(0, str(ROOT))
    (seed, name), args = job
    runs = folder(args)
    shared = ["--model", f"{RUNS}/sft", "--data", args.data, "--lr", str(args.lr), "--epochs", str(args.epochs),
              "--batch-size", "32", "--max-length", "256", "--micro-tokens", "4096", "--dtype", "float32"]
    if name is None:
        run("vote_strength.py", runs / "vote", "report.json", *shared, "--members", str(args.members), "--seed", "100",
            "--eval-data")
        return
    script, *flags = METHODS[name].split()
    flags += ["--strength", f"{runs}/vote/train.jsonl"] * (script == "denoise_rm.py")
    flags += ["--meta-prompts", "1000", "--max-new-tokens", "48", "--sample-batch", "64"] * (script == "meta_rm.py")
    run(script, runs / f"{seed}/{name}", "model", *shared, "--eval-data", *args.eval_data, "--seed", str(seed),
        "--eval-every", "0", "--save-every", "0", *flags)


def accuracy(name, key, args):
    """At the end of a run, over the seeds (S,)."""
    paths = [folder(args) / f"{seed}/{name}/metrics.jsonl" for seed in range(args.seeds)]
    return np.array([json.loads(path.read_text().splitlines()[-1])[f"eval/{key}/accuracy"] for path in paths])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True)
    add("--text", nargs="*", default=[], help="more rows of prompt, chosen and rejected, for the language model alone")
    add("--eval-data", nargs="+", required=True, metavar="NAME=FILE")
    add("--hidden", type=int, default=128)
    add("--layers", type=int, default=3)
    add("--lr", type=float, default=5e-4)
    add("--epochs", type=float, default=1.0)
    add("--members", type=int, default=6)
    add("--seeds", type=int, default=3)
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    add("--jobs", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if not (RUNS / "sft").exists():
        language_model(args)
    context = multiprocessing.get_context("spawn")
    todo = [((seed, name), args) for seed in range(args.seeds) for name in args.methods]
    jobs = [job for job in todo if "denoise" not in METHODS[job[0][1]]]
    later = [job for job in todo if job not in jobs]  # which wait for the votes
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context) as pool:
        votes = pool.submit(work, ((None, None), args))
        for number, _ in enumerate(pool.map(work, jobs), 1):
            print(f"{number} of {len(jobs)}", file=sys.stderr)
        votes.result()
        list(pool.map(work, later))
    names = [pair.split("=")[0] for pair in args.eval_data]
    base = {name: accuracy("baseline", name, args) for name in names}
    table(["accuracy", *names], ["baseline", *(show(base[name]) for name in names)], *(
        [method, *(show(accuracy(method, name, args) - base[name], sign="+") for name in names)]
        for method in args.methods if method != "baseline"))
