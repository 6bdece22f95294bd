"""eval.py: every number against a closed form or brute force, judges that answer nonsense, and whole runs."""

import http.server
import importlib
import itertools
import json
import math
import runpy
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import toy
import transformers
from conftest import ROOT, TINY, data, settings

import common

evaluation = importlib.import_module("eval")  # by name it would hide the builtin
GOLD = ["--gold", str(ROOT / "docs/toy/make.py")]


def write_rows(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory, tokenizer):
    """Folders of two random reward models."""
    folders = [str(tmp_path_factory.mktemp(name) / "model") for name in ("first", "second")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**TINY, num_labels=1, pad_token_id=0)
        model = transformers.LlamaForSequenceClassification(config)
        model.score.weight.data.normal_()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


@pytest.fixture
def run(tmp_path, monkeypatch):
    """eval.py in this process, in an empty folder -> its records of a table."""
    def inner(table, *flags):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
        return [x for x in json.loads(Path("runs/eval/eval.json").read_text()) if x["table"] == table]

    monkeypatch.chdir(tmp_path)
    return inner


def test_best_of_n_by_enumeration():
    rng = np.random.default_rng(0)
    for rewards in (rng.normal(size=6), np.array([1.0, 1, 2, 2, 2, 0]), np.zeros(6)):
        gold = rng.normal(size=6)
        for n, value in zip(range(1, 7), evaluation.best_of_n(rewards, gold, range(1, 7)), strict=True):
            subsets = [np.array(subset) for subset in itertools.combinations(range(6), n)]
            best = [gold[s][rewards[s] == rewards[s].max()].mean() for s in subsets]  # equal rewards: any of them
            assert value == pytest.approx(np.mean(best))


@pytest.mark.parametrize("rewards, num_right, expected", [
    ([2, 1], 1, 1), ([1, 1], 1, 0), ([3, 3, 2, 3], 1, 1 / 3), ([1, 2, 0, 0], 1, 0), ([3, 2, 1, 2.5], 2, 0.75)])
def test_credit(rewards, num_right, expected):
    assert evaluation.credit(np.array(rewards, float), num_right) == expected


def test_calibration_and_overlap():
    """A model that is right as often as it says has no error; one that is too sure has the difference."""
    margin = math.log(3)  # says 0.75
    for fraction, error in ((0.75, 0), (0.5, 0.25), (1, 0.25)):
        right = int(fraction * 400)
        ece, table = evaluation.calibration(np.array([margin] * right + [-margin] * (400 - right)))
        assert ece == pytest.approx(error) and table == [pytest.approx((0.75, fraction, 1))]
    assert evaluation.calibration(np.zeros(3)) == (0, [(0.5, 0.5, 1)])  # ties: sure of nothing, and half right
    same = torch.randn(4000, 2, 8, generator=torch.Generator().manual_seed(0))
    apart = same + torch.tensor([[[1.0], [-1.0]]]) / math.sqrt(8)  # by two standard deviations: 2 Phi(-1) = 0.317
    assert evaluation.overlap(same) > 0.9 and evaluation.overlap(apart) == pytest.approx(0.317, abs=0.04)


def test_metrics_of_margins():
    """Forty rows whose strength falls, one dropped, two ties; the second label agrees with every margin but these."""
    margins = np.array([0, 0, math.nan, *[-2.0, 1.0] * 18, -2.0])
    rows = datasets.Dataset.from_dict({evaluation.STRENGTH: [-float(i) for i in range(40)], "gold": [1, 0] * 20})
    metrics, points = evaluation.measure_margins(margins, rows)
    losses = [math.log1p(math.exp(-x)) for x in margins if not math.isnan(x)]
    assert metrics["loss"] == pytest.approx(np.mean(losses)) and metrics["tie_rate"] == 2 / 39
    assert metrics["accuracy_second"] == 37 / 39 and metrics["accuracy_agreeing"] == 18 / 19
    assert metrics["accuracy_second_half"] == pytest.approx(1.96 * math.sqrt((37 / 39) * (2 / 39) / 38))
    strength = [x.get("accuracy") for x in points if x["table"] == "strength"]
    assert strength == [0.5] * 18 + [None, 0]  # a single value has no interval; the last are two ties


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_self_bleu_by_brute_force(n):
    rng = np.random.default_rng(n)
    texts, values = [rng.choice(["a", "b", "c"], rng.integers(1, 9)).tolist() for _ in range(12)], []
    for i, words in enumerate(texts):
        others, logs = texts[:i] + texts[i + 1 :], []
        for order in range(1, min(n, len(words)) + 1):
            grams, *known = (Counter(zip(*(x[j:] for j in range(order)))) for x in (words, *others))
            matches = sum(min(count, max(x[gram] for x in known)) for gram, count in grams.items())
            logs.append(math.log(max(matches, 0.5) / sum(grams.values())))
        nearest = min((abs(len(x) - len(words)), len(x)) for x in others)[1]
        values.append(math.exp(np.mean(logs)) * min(1.0, math.exp(1 - nearest / len(words))))
    assert evaluation.self_bleu([" ".join(words) for words in texts], n) == pytest.approx(np.mean(values))


def test_what_a_question_becomes():
    transcript, chat = "\n\nHuman: q\n\nAssistant:", [{"role": "user", "content": "q"}]
    assert evaluation.as_dialogue("q", ["a", " b", ""], "transcript") == (transcript, [" a", " b", ""])
    assert evaluation.as_dialogue(transcript, ["a"], "chat") == (transcript, [" a"])
    assert evaluation.as_dialogue("q", ["a"], "chat") == (chat, [[{"role": "assistant", "content": "a"}]])
    assert evaluation.as_dialogue("q", ["a"], "text") == ("q", ["a"])


def test_rewards_are_those_of_plain_transformers(reward_models, tokenizer):
    """Each text alone, for any number of responses, empty ones among them; equal responses get equal rewards."""
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(reward_models[0]).eval()
    model = common.load_reward_model(reward_models[0], tokenizer, torch.device("cpu"), settings(), "--reward-models")
    items = [(row["prompt"], [row["chosen"], row["rejected"], "", row["chosen"]][: 1 + i % 4])
             for i, row in enumerate(toy.make_comparisons("id", 12))]
    items.append((items[0][0], [" apple" * 70, " saw"]))  # so long that nothing is left of the prompt
    args = settings(prompt_format="transcript")
    *rewards, too_long = evaluation.score_responses(model, tokenizer, items, "data", args)
    for (prompt, responses), row in zip(items, rewards):
        ids = [tokenizer(prompt + x + " </s>", return_tensors="pt").input_ids for x in responses]
        assert row == pytest.approx([plain(x).logits.item() for x in ids], abs=1e-5)
        assert len(row) < 4 or row[0] == row[3]
    assert np.isnan(too_long).all()


def test_reward_models(run, reward_models):
    """Comparisons, lists and best of n; two processes find what one finds."""
    lists, choices = [], []
    for i, row in enumerate(toy.make_comparisons("noisy", 12)):
        prompt, right, wrong = row["prompt"], [row["chosen"]], [row["rejected"], " saw"]
        lists.append({"prompt": prompt, "chosen": right, "rejected": wrong[: 1 + i % 2]})
        choices.append({"prompt": prompt, "responses": right + wrong, "scores": [2, 1, 0]})
    flags = ["--reward-models", reward_models[0], f"b={reward_models[1]}", "--plot", "--eval-data",
             f"noisy={data('noisy', 30)}", f"lists={write_rows('lists.jsonl', lists)}",
             f"choices={write_rows('choices.jsonl', choices)}"]
    first, second, *_ = run("reward models", *flags)
    assert (first["model"], second["model"], first["rows"], first["over_first"]) == ("first0", "b", 30, 0)
    assert second["over_first"] == pytest.approx(second["accuracy"] - first["accuracy"])
    assert f"{first['accuracy']:.3f} ± {first['accuracy_half']:.3f}" in Path("runs/eval/eval.md").read_text()
    assert Path("runs/eval/eval.png").read_bytes()[1:4] == b"PNG"
    one = json.loads(Path("runs/eval/eval.json").read_text())
    assert [x["score"] for x in one if x["model"] == "oracle"] == pytest.approx([1, 5 / 3, 2])  # of n = 1, 2, 3
    start = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    subprocess.run([sys.executable, *start, str(ROOT / "eval.py"), *flags], check=True, capture_output=True)
    for x, y in zip(one, json.loads(Path("runs/eval/eval.json").read_text()), strict=True):
        assert x == pytest.approx(y, abs=1e-4)


@pytest.fixture
def policies(tmp_path):
    """Flags of four policies on eight prompts: right words, a right and a wrong word, nothing, and the first again."""
    prompts = [row["prompt"] for row in toy.make_comparisons("id", 8)]
    right, flags = [toy.THINGS[prompt.split()[3]].split()[0] for prompt in prompts], ["--policies"]
    for name, texts in (("right", right), ("long", [f"{x} name" for x in right]), ("empty", [""] * 8), ("same", right)):
        rows = [{"prompt": prompt, "responses": [text, "unread"]} for prompt, text in zip(prompts, texts)]
        flags.append(f"{name}=" + write_rows(str(tmp_path / f"{name}.jsonl"), rows))
    return flags


def test_policies(run, policies, reward_models):
    assert [(x["words"], x["gold"]) for x in run("policies", *policies, *GOLD)] == [(1, 1), (2, 0), (0, 0), (1, 1)]
    assert [(x["lose"], x["net"]) for x in run("wins", *policies, *GOLD)] == [(1, -1), (1, -1), (0, 0)]
    assert [x["tie"] for x in run("wins", *policies, *GOLD, "--tie-threshold", 1)] == [1, 1, 1]
    assert [x["tie"] for x in run("wins", *policies, "--judge", reward_models[0])] == [0, 0, 1]


def test_server(run, policies, monkeypatch):
    """An OpenAI-compatible server that prefers length, one that always says A, and one that stumbles."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers["Authorization"], body["model"]))
            reply = judge(*[x[3:].split("\n\n")[0] for x in body["messages"][0]["content"].split("\n\nAnswer ")[1:]])
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

    def longest(a, b):
        return "[[C]]" if len(a) == len(b) else "not [[B]], [[A]]" if len(a) > len(b) else "not [[A]], [[B]]"

    requests, stumbles = [], iter(["[[A]]", 500, 429, "?"])  # two are asked again, one has no verdict
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "request_queue_size", 64)  # or connections wait for a second
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        for judge, net, missing in ((longest, [1, -1, 0], 0), (lambda a, b: "[[A]]", [0, 0, 0], 0),
                                    (lambda a, b: next(stumbles, "[[A]]"), [0, 0, 0], 1)):
            wins = run("wins", *policies, "--judge", url, "--judge-model", "m")
            assert [x["net"] for x in wins] == net and sum(x["no_verdict"] for x in wins) == missing
        assert requests == [("/v1/chat/completions", "Bearer key", "m")] * (3 * 3 * 16 + 2)
        server.shutdown()


@pytest.mark.parametrize("flags, named", [
    ("", "docs/toy"), ("--reward-models rm", "--eval-data"), ("--policies a=said", "--policies"),
    ("--policies a=said b=said", "--gold"), ("--policies a=said b=said --gold rm", "rm"),
    ("--policies a=said b=others GOLD", "others.jsonl: row 2"), ("--policies a=said b=one GOLD", "one.jsonl: row 2"),
    ("--policies a=bare b=bare GOLD", "row 1"), ("--policies a=said b=said --judge http://[::1]:9", "http://[::1]:9"),
    ("RM x=said", "said.jsonl: row 1"), ("RM x=scores", "scores.jsonl: row 2"), ("RM x=lists", "lists.jsonl: row 1"),
    ("RM x=nulls", "nulls"), ("RM x=bare --prompt-format chat", "bare"), ("RM x=said --reward-models x/rm rm", "rm")])
def test_bad_input(flags, named, run, reward_models):
    Path("rm").symlink_to(reward_models[0])
    one, two = ({"prompt": row["prompt"], "responses": ["a", "b"]} for row in toy.make_comparisons("id", 2))
    files = {"said": [one, two], "others": [one, one], "one": [one], "bare": [{**one, "prompt": "q", "scores": [0, 1]}],
             "scores": [{**one, "scores": scores} for scores in ([1, 2], [1])], "nulls": [{**one, "scores": [1, None]}],
             "lists": [{"prompt": "q", "chosen": ["a"], "rejected": "b"}]}
    for name, rows in files.items():
        flags = flags.replace(f"={name}", "=" + write_rows(f"{name}.jsonl", rows))
    with pytest.raises(SystemExit) as error:
        run("", *flags.replace("GOLD", " ".join(GOLD)).replace("RM", "--reward-models rm --eval-data").split())
    assert named in str(error.value) and "\n" not in str(error.value)
