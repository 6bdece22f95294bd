"""Whole runs of baseline_rm.py: what they learn, that they can be killed, and how they refuse bad input."""

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, TINY, data, launch, settings, toy
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import baseline_rm
import common

RUN = Path("runs/baseline_rm")


def records(folder=RUN):
    """The metrics of a run, step by step, without times and speeds."""
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "sec" not in key} for line in lines]


def weights(folder=RUN):
    return load_file(Path(folder, "model/model.safetensors"))


def assert_close(run, other, rel=1e-5):
    """Two runs have the same metrics and the same model, but for rounding."""
    for ours, theirs in zip(records(run), records(other), strict=True):
        assert ours == pytest.approx(theirs, rel=rel, abs=10 * rel)
    for name, tensor in weights(other).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=0, atol=10 * rel)


def ends_alike(start, whole, broken, sign):
    """The run start(folder, *flags), killed as soon as `sign` is in its folder and then resumed, ends as the one in
    `whole`, which was left alone, bit for bit."""
    run = start(broken)
    while not (broken / sign).exists():
        assert run.is_running(), run.output()
        time.sleep(0.01)
    run.kill()
    assert len(records(broken)) < len(records(whole))
    start(broken, "--resume").finish()
    assert records(broken) == records(whole)
    for path in whole.rglob("model.safetensors"):
        assert (broken / path.relative_to(whole)).read_bytes() == path.read_bytes()


def interrupt(monkeypatch, step, run, *flags):
    """A run that ends like one with Ctrl-C, after `step` is logged."""
    def log(folder, done, metrics, log=common.log):
        log(folder, done, metrics)
        if done == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "log", log)
        run(*flags)


# ---------------------------------------------------------------------------------------------------------- what it is
def test_loss_and_metrics():
    rewards = torch.tensor([[0, 0], [1, -1], [-3, 5], [200, -200], [-200, 200]]).double().requires_grad_()
    expected = torch.tensor([math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(8)), 0.0, 400.0]).double()
    loss = baseline_rm.preference_loss(rewards)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()  # no margin, however bad, loses its gradient
    torch.testing.assert_close(rewards.grad[:, 0], -torch.sigmoid(rewards[:, 1] - rewards[:, 0]))
    sums = dict(zip(baseline_rm.METRICS, baseline_rm.metric_sums(rewards.detach()).tolist()))
    assert sums.pop("loss") == pytest.approx(expected.sum().item())
    assert sums == {"accuracy": 2, "margin": -6, "tie_rate": 1, "reward_chosen": -2, "reward_rejected": 4}


def test_run_against_the_plainest_loop(script, llama, tokenizer):
    """The same run, one response at a time, in float64, AdamW written out; gradients are clipped at every step."""
    script("baseline_rm.py", "--seed", 3, "--max-grad-norm", 0.1)
    model = common.load_reward_model(llama, tokenizer, torch.device("cpu"), settings(seed=3)).hf_model.double()
    rows, steps, warmup = toy.make_comparisons(n=96), 12, 1
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for step, record in enumerate(records()):
        margins = []
        for i in common.batch_indices(96, 16, 3, step):
            texts = [rows[i]["prompt"] + rows[i][key] + " </s>" for key in ("chosen", "rejected")]
            chosen, rejected = (model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts)
            margins.append(chosen - rejected)
        loss = -torch.sigmoid(torch.stack(margins)).log().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = sum(g.square().sum() for g in gradients).sqrt()
        lr = 1e-3 * min((step + 1) / warmup, (steps - step) / (steps - warmup))
        with torch.no_grad():
            for p, g, (m, v) in zip(model.parameters(), gradients, moments):
                g = g * 0.1 / norm
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.95 * v + 0.05 * g * g)
                p -= lr * m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-6)
        assert norm > 0.1 and record["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert record["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["train/lr"] == pytest.approx(lr)


def test_saved_model_gives_the_same_scores(script):
    script("baseline_rm.py", "--eval-every", 5)
    assert [record["step"] for record in records() if "eval/id/accuracy" in record] == [5, 10, 12]
    model = AutoModelForSequenceClassification.from_pretrained(RUN / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(RUN / "model")
    assert set(weights()) == set(model.state_dict()) and model.config.num_labels == 1
    rows, rewards = toy.make_comparisons("id", 40), {}
    for key in ("chosen", "rejected"):  # as anyone would call it: padded texts with EOS
        texts = [row["prompt"] + row[key] + tokenizer.eos_token for row in rows]
        with torch.no_grad():
            rewards[key] = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
        assert rewards[key].mean().item() == pytest.approx(records()[-1][f"eval/id/reward_{key}"], abs=1e-5)
    accuracy = (rewards["chosen"] > rewards["rejected"]).double().mean().item()
    assert accuracy == pytest.approx(records()[-1]["eval/id/accuracy"])


def test_seed_decides_and_micro_batches_do_not(script):
    for name, *flags in ("a", ), ("b", ), ("seed", "--seed", 1), ("one", "--micro-batch-tokens", 1), (
            "all", "--micro-batch-tokens", 10**6):
        script("baseline_rm.py", "--output-dir", name, *flags)
    assert records("a") == records("b") and records("a")[0] != records("seed")[0]
    assert Path("a/model/model.safetensors").read_bytes() == Path("b/model/model.safetensors").read_bytes()
    assert_close("one", "all")


@pytest.mark.parametrize("flags, rel", [
    (["--offload", "--gradient-checkpointing"], 1e-6), (["--dtype", "bfloat16"], 0.02)])
def test_flags_of_memory_and_speed(flags, rel, script, monkeypatch):
    policies, policy = [], common.CPUOffloadPolicy
    monkeypatch.setattr(common, "CPUOffloadPolicy", lambda **kwargs: policies.append(1) or policy(**kwargs))
    script("baseline_rm.py", *flags, "--save-every", 5)
    assert len(policies) == ("--offload" in flags)
    before = records()
    script("baseline_rm.py", *flags, "--save-every", 5, "--resume")
    assert records() == before and {tensor.dtype for tensor in weights().values()} == {torch.float32}
    script("baseline_rm.py", "--output-dir", "plain")
    for ours, plain in zip(before, records("plain"), strict=True):
        assert ours["train/loss"] == pytest.approx(plain["train/loss"], rel=rel)


def test_tied_embeddings(script, llama):
    """The run is that of the same weights untied, and resumes."""
    shutil.copytree(llama, "tied")
    config = json.loads(Path("tied/config.json").read_text())
    Path("tied/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    script("baseline_rm.py", "--output-dir", "plain")
    for flags in ([], ["--resume"]):
        script("baseline_rm.py", "--model", "tied", "--save-every", 5, *flags)
        assert records() == records("plain")
        assert [path.name for path in RUN.glob("checkpoint-*")] == ["checkpoint-10"]


@pytest.mark.parametrize("model", [
    None, "docs/toy/model", "docs/toy/model/", "./docs/toy/model", ROOT / "docs/toy/model"])
def test_the_toy_world_is_the_default(model, monkeypatch):
    """Wherever one stands, and however its model is spelled; the flags that are given win."""
    monkeypatch.chdir(ROOT if model else "/")
    monkeypatch.setattr(sys, "argv", ["baseline_rm.py", "--lr", "1", *(["--model", str(model)] if model else [])])
    args = baseline_rm.parse_args()
    assert args.data == str(ROOT / "docs/toy/train.jsonl") and (args.lr, args.max_length) == (1, 64)
    monkeypatch.setattr(sys, "argv", ["baseline_rm.py", "--model", "docs/toy/reward_model"])
    assert baseline_rm.parse_args().data == "Anthropic/hh-rlhf"


def test_earlier_run_is_renamed(script):
    for seed in (0, 1, 2):
        script("baseline_rm.py", "--seed", seed, "--epochs", 1)
    seeds = {str(path): json.loads((path / "args.json").read_text())["seed"] for path in Path("runs").iterdir()}
    assert seeds == {f"{RUN}.1": 0, f"{RUN}.2": 1, str(RUN): 2}
    # a run that starts from the model there could not be resumed
    assert str(RUN / "model") in refused(script, "--model", RUN / "model")


# -------------------------------------------------------------------------------------------------- processes, kill -9
def test_killed_and_resumed(script, llama, tmp_path):
    """Two ranks train like one, which can go on from their checkpoint."""
    def start(folder, *more):
        return launch(llama, "baseline_rm.py", *flags, "--output-dir", folder, *more, ranks=2)

    flags = ["--epochs", 8, "--save-every", 20, "--eval-every", 0]
    script("baseline_rm.py", *flags, "--output-dir", "one")
    start("whole").finish()
    ends_alike(start, tmp_path / "whole", tmp_path / "broken", "checkpoint-20")
    script("baseline_rm.py", *flags, "--output-dir", "whole", "--resume")
    for key in ("train/loss", "train/grad_norm"):
        two, one = ([record[key] for record in records(run)] for run in ("whole", "one"))
        assert two[:20] == pytest.approx(one[:20], rel=1e-5) and two == pytest.approx(one, rel=1e-3)


def test_an_error_is_one_line(llama, tmp_path):
    """By the hook of common.setup."""
    (tmp_path / "a-file").touch()
    with pytest.raises(AssertionError) as error:
        launch(llama, "baseline_rm.py", "--output-dir", tmp_path / "a-file/run").finish()
    assert "\nerror: NotADirectoryError: " in str(error.value) and "Traceback" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------- bad input
def refused(script, *flags):
    """The one line that a run ends with; nothing that was saved is lost or changed, whatever its name may be now."""
    before = {path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="^error: [^\n]*$") as error:
        script("baseline_rm.py", *flags)
    assert before <= {path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    return str(error.value)


GOOD = {"prompt": "\n\nHuman: name two fruits\n\nAssistant:", "chosen": " fig", "rejected": " dog"}
SAMPLES = {"prompt": GOOD["prompt"], "responses": [" fig", " dog", " saw"]}
FILES = {
    "broken": [GOOD, "{"], "column": [{"chosen": "x"}], "same": [{**GOOD, "rejected": " fig"}], "three": [SAMPLES],
    "unlabelled": [{**SAMPLES, "responses": [" fig", " dog"]}],
    "unknown": [{**GOOD, "prompt": "Why should anyone do this at all?"}],
    "mixed": [SAMPLES, {**SAMPLES, "responses": [" fig", " dog"]}],
}


@pytest.fixture(scope="module")
def folders(llama, tmp_path_factory):
    """Models that cannot be trained."""
    folder = tmp_path_factory.mktemp("models")
    transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**TINY)).save_pretrained(folder / "two-labels")
    transformers.BertModel(transformers.BertConfig(**TINY)).save_pretrained(folder / "encoder")
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    weights = {name: x for name, x in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(folder / "lacking", state_dict=weights)
    for path in folder.iterdir():
        toy.make_tokenizer().save_pretrained(path)
    return folder


@pytest.mark.parametrize("flags, named", [
    (["--data", "none.jsonl"], "none.jsonl"),
    *((["--data", f"{name}.jsonl"], f"{name}.jsonl: ") for name in FILES),
    (["--eval-data", "x=none.jsonl"], "none.jsonl"),
    (["--eval-data", "nameless.jsonl"], "--eval-data"),
    (["--eval-data", f"a/b={data('id', 40)}"], "--eval-data"),
    (["--eval-data", f"x={data('id', 40)}", f"x={data('ood', 40)}"], "--eval-data"),
    (["--batch-size", "0"], "--batch-size"),
    (["--epochs", "nan"], "--epochs"),
    (["--lr", "fast"], "--lr"),
    (["--warmup-ratio", "2"], "--warmup-ratio"),
    (["--sede", "1"], "--sede"),
    (["--max-length", "257"], "--max-length"),
    (["--lr", "1e30", "--max-grad-norm", "1e30"], "learning rate"),
    (["--output-dir", "full"], "full"),
    (["--output-dir", "full/thesis.tex"], "thesis.tex"),
    *((["--model", name], name) for name in ("nowhere", "full", "two-labels", "encoder", "lacking")),
])
def test_bad_input(flags, named, script, folders, tmp_path):
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    for name, rows in FILES.items():
        Path(f"{name}.jsonl").write_text("\n".join(json.dumps(row).strip('"') for row in rows) + "\n")
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("mine")
    (RUN / "model").mkdir(parents=True)  # an earlier run
    for name in ("args.json", "metrics.jsonl", "model/config.json"):
        (RUN / name).write_text(f'{{"name": "{name}"}}\n')
    assert named in refused(script, *flags)


def test_resume_wants_the_same_run(script, llama):
    shutil.copytree(llama, "start")
    shutil.copy(data(), "d.jsonl")
    flags = ["--model", "start", "--data", "d.jsonl", "--save-every", 5]
    script("baseline_rm.py", *flags)
    before = records()
    assert "lr" in refused(script, *flags, "--resume", "--lr", "0.5")
    for name in ("d.jsonl", "start/model.safetensors"):
        stat = os.stat(name)
        os.utime(name)  # written since
        assert name in refused(script, *flags, "--resume")
        os.utime(name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    script("baseline_rm.py", *flags, "--resume")
    assert records() == before
