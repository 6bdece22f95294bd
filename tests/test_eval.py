"""eval.py: every number against a closed form or brute force, judges that answer nonsense, and whole runs."""

import argparse
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
import transformers
from conftest import ROOT, TINY, settings

import common

CPU = torch.device("cpu")
FAMILIES = {
    "llama": transformers.LlamaConfig, "qwen": transformers.Qwen3Config, "mistral": transformers.MistralConfig,
    "gemma": transformers.GemmaConfig}


@pytest.fixture(scope="module")
def evaluate():
    """The script as a module; by name it would hide the builtin."""
    return importlib.import_module("eval")


def reward_model(folder, tokenizer, seed=0, kind="llama", labels=1):
    """A random reward model in a folder of its own, as anybody's."""
    torch.manual_seed(seed)
    config = FAMILIES[kind](**TINY, num_key_value_heads=2, head_dim=8, num_labels=labels, pad_token_id=0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.score.weight.data.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(script):
    """eval.py in this process, in an empty folder; -> its records."""
    def inner(*flags):
        sys.argv = ["eval.py", *map(str, flags)]
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
        return json.loads((Path("runs/eval/eval.json")).read_text())

    return inner


def of(records, table, **fixed):
    return [x for x in records if x["table"] == table and all(x.get(key) == value for key, value in fixed.items())]


# -------------------------------------------------------------------------------------------------------- closed forms
def test_best_of_n_by_enumeration(evaluate):
    rng = np.random.default_rng(0)
    for scores in (rng.normal(size=6), np.array([1.0, 1, 2, 2, 2, 0]), np.zeros(6)):
        gold = rng.normal(size=6)
        result = evaluate.best_of_n(scores, gold, range(1, 7))
        for n in range(1, 7):
            choices = [np.array(choice) for choice in itertools.combinations(range(6), n)]
            best = [gold[c[scores[c] == scores[c].max()]].mean() for c in choices]  # equal scores: any of them
            assert result[n - 1] == pytest.approx(np.mean(best))
    assert evaluate.best_of_n(gold, gold, [1, 6]) == pytest.approx([gold.mean(), gold.max()])
    assert evaluate.best_of_n(np.arange(1500.0), np.ones(1500), [700]) == pytest.approx(1)  # huge binomials


def test_credit(evaluate):
    nan = math.nan
    scores = np.array([[2, 1, nan, nan], [1, 1, nan, nan], [1, 2, nan, nan],  # pairs
                       [3, 1, 2, 0], [3, 3, 2, 3], [1, 2, 0, 0],  # the best of four
                       [3, 2, 1, 2.5], [nan] * 4])  # two right ones and two wrong ones
    right = np.array([1, 1, 1, 1, 1, 1, 2, 1])
    assert evaluate.credit(scores, right)[:7].tolist() == [1, 0, 0, 1, 1 / 3, 0, 0.75]
    assert np.isnan(evaluate.credit(scores, right)[7])


def test_ties_of_rewardbench(evaluate):
    """Two questions: in the first all right answers are ahead, by 0.5, and 2 in the tied form, where they differ by 1;
    in the second the tied form has a wrong answer on top."""
    nan = math.nan
    scores = np.array([[1.5, 1, 0, nan], [4, 3, 1, 0], [5, 4, nan, nan], [2, 1, 3, nan]])
    right, ids = np.array([1, 2, 1, 2]), ["ref:0", "tied:0", "ref:1", "tied:1"]
    by_hand = 0.3 * 1 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0
    by_hand += 0.01 * np.mean([math.tanh(0.5 / 1 - 1), math.tanh(-2 / 1 - 1)])
    assert evaluate.ties_score(scores, right, ids) == pytest.approx(by_hand)


def test_calibration(evaluate):
    """A model that is right as often as it says has no error; one that is too sure has the difference."""
    margin = math.log(3)  # says 0.75
    for share, error in ((0.75, 0.0), (0.5, 0.25), (1.0, 0.25)):
        right = int(share * 400)
        brier, ece, table = evaluate.calibration(np.array([margin] * right + [-margin] * (400 - right)))
        assert ece == pytest.approx(error) and brier == pytest.approx(share * 0.25**2 + (1 - share) * 0.75**2)
        assert table == pytest.approx(np.array([[0.75, share, 1.0]]))
    assert evaluate.calibration(np.zeros(3))[:2] == (0.25, 0.0)  # ties: sure of nothing, and half right
    _, _, table = evaluate.calibration(np.linspace(-9, 9, 1001))
    assert len(table) == 10 and table[:, 2].sum() == pytest.approx(1)


def test_intervals(evaluate):
    """Wilson's for 8 of 10; Student's quantiles at 2, 3, 10 and 1,000 values."""
    result = evaluate.accuracy(np.array([1.0] * 8 + [0.0, 0.0, math.nan]))
    assert [round(result[key], 4) for key in ("rows", "accuracy", "accuracy_low", "accuracy_high")] == [
        10, 0.8, 0.4902, 0.9433]
    for n, quantile in ((2, 12.7062), (3, 4.3027), (10, 2.2622), (1000, 1.9623)):
        values = np.random.default_rng(0).normal(size=n)
        mean, half = evaluate.interval([*values, math.nan])
        assert mean == pytest.approx(values.mean())
        assert half == pytest.approx(quantile * values.std(ddof=1) / math.sqrt(n), rel=1e-3)
    assert math.isnan(evaluate.interval([1.0])[1]) and math.isnan(evaluate.interval([])[0])


def test_overlap(evaluate):
    torch.manual_seed(0)
    same = torch.randn(4000, 2, 8)
    assert evaluate.overlap(same) > 0.9  # 50 bins of 4,000 draws differ by chance by about 0.04
    assert evaluate.overlap(same + torch.tensor([[[20.0], [0.0]]])) == 0
    # Normal distributions two standard deviations apart along the line share 2 Phi(-1) = 0.317.
    apart = same + torch.tensor([[[1.0], [-1.0]]]) / math.sqrt(8)
    assert evaluate.overlap(apart) == pytest.approx(0.317, abs=0.04)


def test_second_label(evaluate):
    found = evaluate.second_label([1, 0, -1, None, 1.0, [3, 1], [1, 3, 0], [2, 2], ["x"], "A"])
    assert np.nan_to_num(found, nan=9).tolist() == [1, -1, 9, 9, 1, 2, -2, 0, 9, 9]


def test_ensemble(evaluate):
    scores = np.array([[[1.0, 3], [5, math.nan]], [[11, 12], [16, math.nan]]])  # means 3 and 13
    several = evaluate.ensemble(scores, 0.5)
    assert several["mean"][0].tolist() == [-2, -0.5] and several["worst"][0].tolist() == [-2, -1]
    assert several["mean - 0.5 variance"][0].tolist() == [-2, -0.5 - 0.5 * 0.25] and math.isnan(several["mean"][1, 1])


def brute_self_bleu(texts, n):
    values = []
    for i, text in enumerate(texts):
        words, others, product = text.split(), [x.split() for j, x in enumerate(texts) if j != i], 1.0
        orders = min(n, len(words))
        for order in range(1, orders + 1):
            grams = Counter(tuple(words[j : j + order]) for j in range(len(words) - order + 1))
            known = [Counter(tuple(x[j : j + order]) for j in range(len(x) - order + 1)) for x in others]
            matches = sum(min(count, max(x[gram] for x in known)) for gram, count in grams.items())
            product *= max(matches, 0.5) / sum(grams.values())
        nearest = min((abs(len(x) - len(words)), len(x)) for x in others)[1]
        values.append(product ** (1 / orders) * min(1.0, math.exp(1 - nearest / len(words))))
    return np.mean(values)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_self_bleu_by_brute_force(evaluate, n):
    rng = np.random.default_rng(n)
    texts = [" ".join(rng.choice(["a", "b", "c"], rng.integers(1, 9))) for _ in range(12)]
    assert evaluate.self_bleu(texts, n) == pytest.approx(brute_self_bleu(texts, n))
    assert evaluate.self_bleu(["a b c d e f"] * 3, n) == evaluate.self_bleu(["a", "a", ""], n) == pytest.approx(1)
    assert math.isnan(evaluate.self_bleu(["a"], n))


def test_perplexity_by_hand(evaluate, llama, tokenizer):
    """exp of the mean loss on response tokens and EOS alone, of two prompts of different length."""
    args = argparse.Namespace(dtype="float32", max_length=64)
    prompts = ["\n\nHuman: name two fruits\n\nAssistant:", "\n\nHuman: name three fruits and tools\n\nAssistant:"]
    said, losses = [" apple pear", " saw"], []
    model = transformers.LlamaForCausalLM.from_pretrained(llama).eval()
    for prompt, response in zip(prompts, said):
        ids = torch.tensor([tokenizer(prompt + response).input_ids + [tokenizer.eos_token_id]])
        count = len(response.split()) + 1
        logp = torch.log_softmax(model(ids).logits[0, -1 - count : -1], -1)
        losses += (-logp[torch.arange(count), ids[0, -count:]]).tolist()
    found = evaluate.perplexity(str(llama), prompts, said, args, CPU)
    assert found == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_markdown_and_means_over_runs(evaluate, tmp_path):
    runs = []
    for seed, value in enumerate((0.5, 0.6, 0.7)):
        records = [{"table": "reward models", "set": "id", "model": "a", "rows": 10, "accuracy": value,
                    "accuracy_low": 0.1, "accuracy_high": 0.9, "ece": math.nan}]
        evaluate.write(tmp_path / str(seed), records)
        runs.append(tmp_path / str(seed) / "eval.json")
    assert "| id | a | 10 | 0.500 [0.100, 0.900] | - |" in (tmp_path / "0/eval.md").read_text()
    (merged,) = evaluate.aggregate(runs, ["table", "set", "model"])
    assert merged["runs"] == 3 and merged["accuracy"] == pytest.approx(0.6)
    assert merged["accuracy_half"] == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert "accuracy_low" not in merged
    (tmp_path / "bad.json").write_text("x")
    with pytest.raises(SystemExit, match="bad.json"):
        evaluate.aggregate([tmp_path / "bad.json"], ["table"])


# -------------------------------------------------------------------------------------------------------- what is read
def test_forms_of_benchmarks(evaluate):
    assert evaluate.read_item({"prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"]}) == ("q", [*"abcd"], 1)
    assert evaluate.read_item({"prompt": "q", "chosen": [*"abc"], "rejected": [*"def"]}) == ("q", [*"abcdef"], 3)
    assert evaluate.read_item({"input": "q", "output_1": "a", "output_2": "b", "label": 2}) == ("q", ["b", "a"], 1)
    row = {"question": "q", "response_A": "a", "response_B": "b"}
    assert evaluate.read_item({**row, "label": "A>B"}) == ("q", ["a", "b"], 1)
    assert evaluate.read_item({**row, "label": "B>A"}) == ("q", ["b", "a"], 1)
    for bad, words in (({**row, "label": "A=B"}, "'A=B' is none of"),
                       ({"prompt": "q", "responses": "ab"}, "no list of two"),
                       ({"prompt": "q", "responses": ["a"]}, "no list of two"),
                       ({"prompt": "q", "chosen": ["a"], "rejected": "bc"}, "no lists of one or more"),
                       ({"prompt": "q", "chosen": [], "rejected": ["b"]}, "no lists of one or more"),
                       ({"prompt": "q", "chosen": ["a"], "rejected": ["b"], "subset": "Ties", "id": 7}, "like ref:1")):
        with pytest.raises(ValueError, match=words):
            evaluate.read_item(bad)
    assert evaluate.true_scores({"responses": ["a", "b"], "best": 1}).tolist() == [0, 1]
    for bad in ({"best": 2}, {"best": None}, {"scores": [1]}, {"scores": [1, math.nan]}):
        with pytest.raises(ValueError):
            evaluate.true_scores({"responses": ["a", "b"], **bad})


def test_a_question_becomes_a_dialogue(evaluate, tokenizer):
    assert evaluate.dialogue("q?", ["a", " b"], tokenizer) == ("\n\nHuman: q?\n\nAssistant:", [" a", " b"])
    assert evaluate.dialogue("\n\nHuman: q?\n\nAssistant:", ["a", " b"], tokenizer)[1] == [" a", " b"]
    chat = common.toy_tokenizer()
    chat.chat_template = "x"
    assert evaluate.dialogue("q?", ["a"], chat) == (
        [{"role": "user", "content": "q?"}], [[{"role": "assistant", "content": "a"}]])


def test_parts(evaluate):
    """RM-Bench's levels, RewardBench 2's subsets and ties, strength in twentieths, a second label."""
    styles = np.array([[2.0, 1, 0, 1.5, 0.5, -1]])  # chosen concise, plain, markdown; rejected alike
    rows = datasets.Dataset.from_list([{"domain": "chat"}])
    _, parts, _ = evaluate.measure(rows, [("q", [*"abcdef"], 3)], styles, None, None, ["domain"])
    found = {part["value"]: part["accuracy"] for part in parts}
    assert (found["easy"], found["normal"], found["hard"]) == (0, 1, 1)
    assert found["markdown, concise"] == 0 and found["concise, markdown"] == 1 and found["chat"] == pytest.approx(6 / 9)

    rows = datasets.Dataset.from_dict({"subset": ["Math", "Math", "Ties", "Ties"], "id": ["1", "2", "ref:0", "tied:0"]})
    items = [("q", [*"abcd"], 1)] * 2 + [("q", [*"abc"], 1), ("q", [*"abcd"], 2)]
    scores = np.array([[3.0, 1, 1, 1], [0, 1, 1, 1], [3, 1, 0, math.nan], [4, 3, 1, 0]])
    record, parts, counted = evaluate.measure(rows, items, scores, None, None, ["subset"])
    found, tied = {part["value"]: part["accuracy"] for part in parts}, 1 + 0.01 * math.tanh(1)
    assert record["rows"] == 2 and record["accuracy"] == 0.5 and found["Math"] == 0.5
    assert found["Ties"] == pytest.approx(tied)
    assert found["all, with equal weights"] == pytest.approx((0.5 + tied) / 2)

    n = 40
    rows = datasets.Dataset.from_dict({evaluate.STRENGTH: [float(-i) for i in range(n)], "gold": [1, 0] * 20})
    margin = np.array([1.0, -1.0] * 20)
    margin[:2] = 0  # a tie is wrong, whatever the second label
    scores = np.stack([margin, 0 * margin], 1)
    record, parts, counted = evaluate.measure(rows, None, scores, None, np.ones(n), [])
    assert record["accuracy"] == 19 / 40 and record["accuracy_second"] == 38 / 40
    assert record["accuracy_agreeing"] == 19 / 20 and record["tie_rate"] == 2 / 40
    assert record["over_first"] == pytest.approx(-21 / 40)
    assert [part["rows"] for part in parts] == [2] * 20
    assert parts[0]["accuracy"] == 0.5 and parts[-1]["accuracy"] == 0  # the weakest are the last rows
    losses = [math.log1p(math.exp(-x)) for x in margin]
    assert record["loss"] == pytest.approx(np.mean(losses))


@pytest.mark.parametrize("kind", FAMILIES)
def test_scores_are_those_of_plain_transformers(evaluate, kind, tmp_path, tokenizer):
    """Comparisons, and questions with four answers: as AutoModelForSequenceClassification scores each text alone,
    whatever the size of the batches."""
    folder = reward_model(tmp_path / kind, tokenizer, kind=kind)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = datasets.Dataset.from_list(common.toy_comparisons("id", 30))
    items = [(row["prompt"], [row["chosen"], row["rejected"], "apple"][: 2 + i % 2], 1) for i, row in enumerate(rows)]
    model = common.load_reward_model(
        folder, common.load_tokenizer(folder, None), CPU, settings(), flag="--reward-models")

    def alone(prompt, response):
        ids = tokenizer(prompt + response).input_ids + [tokenizer.eos_token_id]
        with torch.no_grad():
            return plain(torch.tensor([ids])).logits.item()

    for micro_tokens in (1, 4096):
        args = argparse.Namespace(max_length=64, micro_tokens=micro_tokens)
        pairs, features = evaluate.score_set(model, tokenizer, rows, None, "x", args)
        several, none = evaluate.score_set(model, tokenizer, rows, items, "x", args)
        for i, row in enumerate(rows):
            expected = [alone(row["prompt"], row[key]) for key in ("chosen", "rejected")]
            assert pairs[i] == pytest.approx(expected, abs=1e-4)
            expected.append(alone(row["prompt"], " apple") if i % 2 else math.nan)
            assert several[i] == pytest.approx(expected, abs=1e-4, nan_ok=True)
    assert features.shape == (30, 2, 32) and none is None


def test_a_benchmark_keeps_its_odd_rows(evaluate, tmp_path, tokenizer):
    """Empty and identical responses are dropped from training data, but a judge has to score them."""
    folder = reward_model(tmp_path, tokenizer)
    model = common.load_reward_model(folder, tokenizer, CPU, settings())
    items = [("name two fruits", ["apple", "apple"], 0), ("name two fruits", ["", "apple"], 0),
             ("name two fruits", ["apple", "fig", "apple"], 0)]
    scores, _ = evaluate.score_set(
        model, tokenizer, items, items, "x", argparse.Namespace(max_length=64, micro_tokens=64))
    assert scores[2, 0] == scores[2, 2] != scores[2, 1] and np.isnan(scores[:2, 2]).all()
    scores = scores[:2, :2]
    assert np.isfinite(scores).all() and scores[0] == pytest.approx(scores[1, 1], abs=1e-5)
    assert scores[0, 0] == scores[0, 1]  # to the last bit, or one of them would win


def test_a_dropped_comparison_has_no_score(evaluate, llama, tokenizer):
    model = common.load_reward_model(llama, tokenizer, CPU, settings())
    rows = common.toy_comparisons("id", 4)
    rows[1]["chosen"] = rows[1]["rejected"]
    args = argparse.Namespace(max_length=64, micro_tokens=64)
    scores, features = evaluate.score_set(model, tokenizer, datasets.Dataset.from_list(rows), None, "x", args)
    assert np.isfinite(scores[:, 0]).tolist() == [True, False, True, True] and len(features) == 3
    alone, _ = evaluate.score_set(model, tokenizer, datasets.Dataset.from_list(rows[3:]), None, "x", args)
    assert scores[3] == pytest.approx(alone[0], abs=1e-5)


def test_average_of_weights(evaluate, tmp_path, tokenizer):
    folders = [reward_model(tmp_path / str(seed), tokenizer, seed) for seed in range(3)]
    evaluate.average_of_weights(folders, tmp_path / "warm")
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    states = [load(folder).state_dict() for folder in folders]
    for key, value in load(tmp_path / "warm").state_dict().items():
        torch.testing.assert_close(value, sum(state[key] for state in states) / 3)
    assert common.load_tokenizer(tmp_path / "warm", None).get_vocab() == tokenizer.get_vocab()
    other = reward_model(tmp_path / "other", tokenizer, kind="qwen")
    assert not evaluate.average_of_weights([folders[0], other], tmp_path / "warm2")
    tokenizer = common.toy_tokenizer()
    tokenizer.add_tokens(["strange"])
    tokenizer.save_pretrained(folders[1])
    assert not evaluate.average_of_weights(folders, tmp_path / "warm2") and not (tmp_path / "warm2").exists()


# -------------------------------------------------------------------------------------------------------------- judges
@pytest.mark.parametrize("reply, verdict", [
    ("A is better. [[A]]", 1), ("[[B]]", -1), ("[[C]]", 0), ("not [[A]] but [[B]]", -1), ("A", None), ("", None),
    (None, None), ("[[D]]", None)])
def test_verdicts(evaluate, reply, verdict):
    assert evaluate.read_verdict(reply) == verdict


def test_both_orders_are_asked(evaluate):
    """Only what wins in both places wins: a judge that always says A gives ties, and one without answer no win."""
    one, other, prompts = ["good", "bad", "same", "good"], ["bad", "good", "same", "bad"], [*"wxyz"]

    def fair(texts):
        replies = []
        for text in texts:
            a, b = text.split("Answer A:\n")[1].split("\n\nAnswer B:\n")
            a, b = a.strip(), b.split("\n")[0].strip()
            replies.append("[[C]]" if a == b else "[[A]]" if a == "good" else "[[B]]")
        return replies

    def verdicts(ask):
        return evaluate.verdicts_by_asking(ask, evaluate.JUDGES["assistant"], prompts, one, other)

    wins, silent = verdicts(fair)
    assert wins.tolist() == [1, -1, 0, 1] and silent == 0
    assert verdicts(lambda texts: ["[[A]]"] * len(texts))[0].tolist() == [0] * 4
    for place in (0, 4):  # of the first pair, in its first and in its second order
        wins, silent = verdicts(lambda texts: [*fair(texts)[:place], None, *fair(texts)[place + 1 :]])
        assert wins.tolist() == [0, -1, 0, 1] and silent == 1
    for wording in evaluate.JUDGES.values():
        assert "{p}" in wording.format(prompt="{p}", a="{", b="}")


@pytest.fixture
def server():
    """An OpenAI-compatible address whose answers a test sets: text, status code, bytes, or seconds to wait."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append((self.path, self.headers["Authorization"], body))
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if isinstance(answer, float):
                threading.Event().wait(answer)
            reply = answer if isinstance(answer, bytes) else json.dumps(
                {"choices": [{"message": {"content": answer}}]}).encode()
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    lock, asked, answers = threading.Lock(), [], []
    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    host.handle_error = lambda *_: None  # who does not wait for an answer
    threading.Thread(target=host.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{host.server_port}/v1", answers, asked
    host.shutdown()


@pytest.fixture
def ask(evaluate, monkeypatch):
    waits = []
    monkeypatch.setattr(evaluate.time, "sleep", lambda seconds: waits.append(seconds))

    def inner(url, texts, timeout=5.0):
        args = argparse.Namespace(judge_model="m", judge_tokens=9, judge_timeout=timeout)
        return evaluate.ask_address(url, texts, args), waits

    return inner


def test_an_address_is_asked(ask, server, monkeypatch):
    url, answers, asked = server
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    answers += ["[[A]]", "[[B]]"]
    assert ask(url, ["x", "y", "z"])[0] == ["[[A]]", "[[B]]", "[[B]]"]
    path, key, body = asked[0]
    assert path == "/v1/chat/completions" and key == "Bearer k"
    assert body == {"model": "m", "temperature": 0, "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}


def test_an_address_is_asked_again(ask, server):
    """Errors of the server, nonsense instead of JSON, JSON without an answer: four times, then it said nothing."""
    url, answers, asked = server
    answers += ["fine", 500, b"nonsense", b"{}", 429]
    replies, waits = ask(url, ["x", "y"])
    assert replies == ["fine", None] and len(asked) == 5 and waits == [1, 4, 16, 0]


def test_an_address_takes_too_long(ask, server):
    url, answers, _ = server
    answers += ["fine", "never mind"]
    answers[1] = 0.5  # seconds; the JSON that follows comes too late
    assert ask(url, ["x", "y"], timeout=0.1)[0] == ["fine", None]


def test_an_address_that_is_not_there(ask, server):
    url, answers, _ = server
    answers += [401]
    with pytest.raises(SystemExit, match=f"--judge {url}: HTTPError: .*401"):
        ask(url, ["x"])
    answers[0] = 500
    with pytest.raises(SystemExit, match=f"--judge {url} does not answer: HTTPError: .*500"):
        ask(url, ["x"])
    with pytest.raises(SystemExit, match="does not answer: URLError"):
        ask("http://127.0.0.1:9/v1", ["x"])


# ---------------------------------------------------------------------------------------------------------- whole runs
def test_reward_models(run, tmp_path, tokenizer):
    for seed in range(2):
        reward_model(tmp_path / f"m{seed}/model", tokenizer, seed)
    rows = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"], " apple"], "scores": [2, 1, 0]}
            for row in common.toy_comparisons("id", 12)]
    Path("bon.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = run("--reward-models", "m0/model", "b=m1/model", "--ensemble", "--eval-data", "id=toy:id,n=30",
                  "noisy=toy:noisy,n=30", "--best-of-n", "bon=bon.jsonl", "--plot")
    names = ["m0", "b", "average of weights", "mean", "worst", "mean - 0.1 variance"]
    assert [x["model"] for x in of(records, "reward models", set="id")] == names
    assert "over_first" not in of(records, "reward models", set="id")[0]
    assert all(x["over_first_half"] > 0 for x in of(records, "reward models", set="id")[1:])
    curve = of(records, "best of n", model="oracle")
    assert [x["n"] for x in curve] == [1, 2, 3]
    assert [x["score"] for x in curve] == pytest.approx([1, 5 / 3, 2])
    assert curve[1]["kl"] == pytest.approx(math.log(2) - 0.5)
    drawn = {path.name for path in Path("runs/eval").glob("*.[ps][nv]g")}
    assert {"accuracy.png", "calibration.svg", "scores.png", "differences.svg", "best_of_n.png"} <= drawn
    assert "| id | m0 |" in Path("runs/eval/eval.md").read_text()
    lines = [json.loads(line) for line in Path("runs/eval/metrics.jsonl").read_text().splitlines()]
    assert [line["model"] for line in lines] == names[:3]


@pytest.fixture
def talkers(llama, tmp_path, tokenizer):
    """Two policies, one of which has been asked already: it said one right word each time."""
    prompts = [row["prompt"] for row in common.toy_comparisons("id", 8)]
    rows = [{"prompt": p, "response": next(iter(common.THINGS[p.split()[3]].split()))} for p in prompts]
    Path(tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return ["--reward-models", "--prompts", "prompts.jsonl", "--max-new-tokens", 6, "--policies", f"wild={llama}",
            "said=said.jsonl"]


def test_policies(run, talkers, tmp_path, tokenizer, llama):
    records = run(*talkers)
    wild, said = of(records, "policies")
    assert said["gold"] == 1 and said["words"] == 1 and said["prompts"] == 8 and wild["perplexity"] > 1
    (wins,) = of(records, "wins")
    answers = [json.loads(line) for line in Path("runs/eval/answers-wild.jsonl").read_text().splitlines()]
    gold = np.array([common.toy_gold(row["prompt"], row["response"]) for row in answers])
    assert wins["win"] == np.mean(gold < 1) and wins["lose"] == np.mean(gold > 1) and wins["against"] == "wild"
    reward_model(tmp_path / "rm", tokenizer)
    (plain,), (tied,) = (of(run(*talkers, "--judge", "rm:rm", *flags), "wins") for flags in (
        (), ("--tie-threshold", 1e3)))
    assert plain["tie"] < 1 == tied["tie"]
    (silent,) = of(run(*talkers, "--judge", f"llm:{llama}", "--judge-tokens", 4), "wins")
    assert silent["no_answer"] == 8 and silent["tie"] == 1 and silent["net"] == 0


def test_policies_on_prompts_of_files(run, talkers, server):
    url, answers, asked = server
    answers.append("[[B]]")
    (wins,) = of(run("--reward-models", "--policies", "a=said.jsonl", "b=said.jsonl", "--judge", url), "wins")
    assert wins["tie"] == 1 and len(asked) == 1 + 16  # once to see whether anybody is there


def test_means_over_runs(run, talkers):
    run(*talkers)
    run(*talkers)  # the former is moved aside, to runs/eval.1
    for files in ([], ["runs/eval.1/eval.json", "runs/tables/eval.json"]):  # neither is a run of its own
        with pytest.raises(SystemExit) as end:
            run("--tables", "runs/eval/eval.json", "runs/eval/eval.json", *files)
        assert not end.value.code
    first = json.loads(Path("runs/tables/eval.json").read_text())[0]
    assert first["table"] == "policies" and first["runs"] == 2 and first["words_half"] == 0


def test_two_processes_agree(talkers, run, tmp_path, tokenizer):
    reward_model("rm", tokenizer)
    flags = [*talkers, "--judge", "rm:rm", "--output-dir", "runs/eval"]
    flags[1:1] = ["rm", "--eval-data", "id=toy:id,n=30"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*start, str(ROOT / "eval.py"), *map(str, flags)], check=True, capture_output=True, cwd=tmp_path)
    two = json.loads(Path("runs/eval/eval.json").read_text())
    for one, other in zip(run(*flags), two, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("flags, words", [
    (["--reward-models", "nowhere"], "nowhere"),
    (["--reward-models", "a-run"], "a-run is no model, but a-run/model is"),
    (["--reward-models", "lm"], "--reward-models lm is no reward model: it lacks score.weight"),
    (["--reward-models", "two"], "--reward-models two: its `score` head has 2 labels, that of a reward model has one"),
    (["--reward-models", "rm", "--eval-data", "x=english.jsonl"], "knows less than half the words"),
    (["--reward-models", "rm", "--eval-data", "x=empty.jsonl"], "empty.jsonl: no rows"),
    (["--reward-models", "rm", "--eval-data", "empty.jsonl"], "give every set a name"),
    (["--reward-models", "rm", "--eval-data", "a/b=toy:id"], "and no / or : in it"),
    (["--reward-models", "rm", "--eval-data", "x=label.jsonl"], "label.jsonl: row 1: ValueError: its label 'C'"),
    (["--reward-models", "rm", "rm"], "give each a name of its own"),
    (["--reward-models", "rm", "--ensemble"], "name two or more of --reward-models rm"),
    (["--reward-models", "rm", "--best-of-n", "x=no_scores.jsonl"], "it has neither 'scores' nor a 'best' from 0"),
    (["--reward-models", "--eval-data", "x=toy"], "go together"),
    (["--policies", "lm"], "name two or more"),
    (["--policies", "a=said.jsonl", "b=others.jsonl"], "others.jsonl: row 2 has another prompt"),
    (["--policies", "a=said.jsonl", "b=fewer.jsonl"], "fewer.jsonl: 1 rows, but 2 prompts"),
    (["--policies", "a=said.jsonl", "b=label.jsonl"], "label.jsonl: no column 'p"),
    (["--policies", "a=said.jsonl", "b=rm", "--eval-prompts", "2", "--max-new-tokens", "6"],
     "--policies rm is no language model"),
    (["--policies", "a=said.jsonl", "b=null.jsonl"], "null.jsonl: row 1: prompt and response are neither"),
    (["--reward-models", "rm", "--eval-data", "x=toy:id", "--best-of-n", "x=toy"], "give every set a name of its own"),
    (["--reward-models", "mean=rm"], "give each a name of its own"),
    (["--reward-models", "rm", "--eval-data", "x=strength.jsonl"], "does not hold numbers alone"),
    (["--policies", "a=said.jsonl", "b=said.jsonl", "--reference", "nowhere"], "nowhere is no model"),
    (["--policies", "a=said.jsonl", "b=said.jsonl", "--judge", "llm:nowhere"], "nowhere is no model"),
    (["--policies", "a=said.jsonl", "b=lm", "--prompts", "text.jsonl", "--max-new-tokens", "6"], "--judge gold knows"),
    (["--tables", "args.json"], "--tables args.json"),
    (["--policies", "a=text.jsonl", "b=text.jsonl"], "--judge gold knows the toy's prompts only"),
    (["--policies", "a=said.jsonl", "b=said.jsonl", "--judge", "rm:lm"], "--judge lm is no reward model"),
    (["--policies", "a=said.jsonl", "b=said.jsonl", "--judge", "me"], "--judge me: it is gold"),
    (["--tables", "none.json"], "--tables none.json: FileNotFoundError"),
    ([], "nothing in runs: train a reward model"),
])
def test_bad_input(flags, words, run, llama, tokenizer):
    reward_model("rm", tokenizer)
    reward_model("two", tokenizer, labels=2)
    Path("a-run/model").mkdir(parents=True)
    transformers.LlamaForCausalLM.from_pretrained(llama).save_pretrained("lm")
    tokenizer.save_pretrained("lm")
    one, two = (row["prompt"] for row in common.toy_comparisons("id", 2))
    files = {
        "empty": [], "label": [{"question": "q", "response_A": "a", "response_B": "b", "label": "C"}],
        "english": [{"question": "Who wrote it and why?", "response_A": "a", "response_B": "b", "label": "A>B"}],
        "no_scores": [{"prompt": one, "responses": ["a", "b"]}], "text": [{"prompt": "hello", "response": "you"}],
        "said": [{"prompt": p, "response": "apple"} for p in (one, two)],
        "others": [{"prompt": p, "response": "apple"} for p in (one, one)],
        "fewer": [{"prompt": one, "response": "apple"}],
        "null": [{"prompt": p, "response": None} for p in (one, two)],
        "strength": [{**row, "mean preference difference": "x"} for row in common.toy_comparisons("id", 2)]}
    Path("args.json").write_text(json.dumps({"a": 1}))
    for name, rows in files.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as error:
        run(*flags)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_bad_call_moves_nothing_aside(run, tokenizer):
    reward_model("rm", tokenizer)
    reward_model("two", tokenizer, labels=2)
    run("--reward-models", "rm", "--eval-data", "x=toy:id,n=20")
    for flags in (["two"], ["rm", "--ensemble"], ["nowhere"]):
        with pytest.raises(SystemExit):
            run("--reward-models", *flags, "--eval-data", "x=toy:id,n=20")
    assert len(list(Path("runs").iterdir())) == 1
