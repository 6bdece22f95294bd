"""eval.py: every number against a closed form or brute force, judges that answer nonsense, and whole runs."""

import http.server
import importlib
import itertools
import json
import math
import runpy
import sys
import threading
import weakref
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import toy
import transformers
from conftest import ROOT, TINY, data, settings
from launch import Launch

import common

evaluation = importlib.import_module("eval")  # by name it would hide the builtin
GOLD = ["--gold", str(ROOT / "docs/toy/make.py")]


def write_rows(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def save_reward_model(folder, tokenizer, seed=0, pad_token_id=0):
    torch.manual_seed(seed)
    size = {**TINY, "vocab_size": len(tokenizer)}
    config = transformers.LlamaConfig(**size, num_labels=1, pad_token_id=pad_token_id)
    model = transformers.LlamaForSequenceClassification(config)
    model.score.weight.data.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory, tokenizer):
    """Folders of two random reward models."""
    folders = [tmp_path_factory.mktemp(name) / "model" for name in ("first", "second")]
    return [save_reward_model(folder, tokenizer, seed) for seed, folder in enumerate(folders)]


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


def test_overlap():
    same = torch.randn(4000, 2, 8, generator=torch.Generator().manual_seed(0))
    apart = same + torch.tensor([[[1.0], [-1.0]]]) / math.sqrt(8)  # by two standard deviations: 2 Phi(-1) = 0.317
    assert evaluation.overlap(same) > 0.9 and evaluation.overlap(apart) == pytest.approx(0.317, abs=0.04)


def test_length_bias():
    """Chosen is longer, shorter, equally long; the model prefers longer, longer, rejected."""
    ids = [[[1, 2, 3], [1]], [[1], [2, 3]], [[1, 2], [3, 4]]]
    metrics = evaluation.length_bias(np.array([1.0, -1.0, -1.0]), ids)
    assert metrics["longer_wins"].tolist() == [1, 0, 0.5]
    assert metrics["prefers_longer"][:2].tolist() == [1, 1]
    assert np.isnan(metrics["prefers_longer"][2])
    summary = evaluation.summarize(metrics)
    assert (summary["longer_wins"], summary["prefers_longer"]) == (0.5, 1)
    tie = evaluation.length_bias(np.zeros(3), ids)["prefers_longer"]
    assert tie[:2].tolist() == [0, 0]  # a tie prefers neither


def test_second_label():
    """Four pairs: gold prefers chosen, rejected, neither, chosen; the last margin is a tie."""
    rows = datasets.Dataset.from_dict({"gold": [1, 0, -1, 1], "GPT4 label": [0, 0, 0, 0]})
    text = datasets.Dataset.from_dict({"gold": ["1", "0", "-1", None]})
    assert evaluation.second_label(np.array([2.0, -1.0, 3.0, 0.0]), text)["accuracy_second"].tolist() == [1, 1]
    found = evaluation.second_label(np.array([2.0, -1.0, 3.0, 0.0]), rows)
    assert found["accuracy_second"].tolist() == [1, 1, 0]
    assert found["accuracy_agreeing"].tolist() == [1, 0]
    same = datasets.Dataset.from_dict({"GPT4 label": [1, 1]})
    assert evaluation.second_label(np.ones(2), same) == {}


def test_strength_curve():
    """Forty strengths that fall, and four rows without one, which the model has right."""
    strength = np.array([*range(0, -40, -1), *[math.nan] * 4], float)
    margins = np.array([0.0, 0.0, *[-2.0, 1.0] * 19, *[9.0] * 4])
    points = evaluation.strength_curve(margins, strength)
    assert [x["accuracy"].tolist() for x in points] == [[True, False]] * 19 + [[False, False]]
    assert [x["segment"] for x in points] == [*range(1, 21)]


def test_summarize():
    values = np.array([1.0, 0.0, 1.0, math.nan, 1.0])
    summary = evaluation.summarize({"table": "t", "accuracy": values, "one": values[:1], "overlap": 0.5})
    half = 1.96 * math.sqrt(0.25 * 0.75 / 3)  # of n - 1
    expected = {"table": "t", "rows": 4, "dropped": 1, "accuracy": 0.75, "one": 1.0, "overlap": 0.5}
    assert summary == {**expected, "accuracy_half": pytest.approx(half)}  # one value: no interval


def test_shared_bigrams():
    """Bigrams: ab, bc and ab, bd share one of two each; "a" has none; a repetition counts once."""
    assert evaluation.shared_bigrams(["a b c", "a b d", "a", ""]) == 0.5
    assert evaluation.shared_bigrams(["a b a b", "c d"]) == 0
    assert evaluation.shared_bigrams(["", ""]) == 0


@pytest.mark.parametrize("row, form", [
    ({"prompt": "q", "chosen": " a", "rejected": " b", "responses": [" a", " b"]}, "comparisons"),
    ({"chosen": ["q", "a"], "rejected": ["q", "b"]}, "comparisons"),
    ({"chosen": [{"role": "user", "content": "q"}]}, "comparisons"),
    ({"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"], "responses": ["a"]}, "lists"),
    ({"prompt": "q", "responses": ["a", "b"]}, "scores"), ({"text": "q"}, "comparisons")])
def test_forms(row, form):
    empty = dict.fromkeys(row)  # null does not hide the form
    assert evaluation.find_form(datasets.Dataset.from_list([empty, row])) == form


def test_rows_without_responses_are_dropped(tmp_path):
    rows = [{"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]},
            {"prompt": None, "responses": ["a"], "scores": [1]},
            {"prompt": "q", "responses": [], "scores": []}, {"prompt": "q", "responses": None}]
    source = write_rows(tmp_path / "scores.jsonl", rows)
    found = evaluation.load_set(str(source), None)
    assert found.items == [("q", ["a", "b"])] and [x.tolist() for x in found.targets] == [[1, 2]]
    rows = [{"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"]},
            {"prompt": "q", "chosen": [], "rejected": ["b"]}]
    source = write_rows(tmp_path / "lists.jsonl", rows)
    found = evaluation.load_set(str(source), None)
    assert found.items == [("q", ["a", "b", "c"])] and found.targets == [1]


def test_text_for_a_judge():
    call = {"role": "assistant", "content": None, "tool_calls": ["saw"]}
    assert evaluation.as_text([call]) == "['saw']"
    assert evaluation.as_text([{"role": "user", "content": "q"}, call]) == "user: q\n\nassistant: ['saw']"


def test_what_a_question_becomes():
    transcript, chat = "\n\nHuman: q\n\nAssistant:", [{"role": "user", "content": "q"}]
    assert evaluation.as_dialogue("q", ["a", " b", ""], "transcript") == (transcript, [" a", " b", ""])
    assert evaluation.as_dialogue(transcript, ["a"], "chat") == (transcript, ["a"])  # as training reads it
    assert evaluation.as_dialogue("q", ["a"], "chat") == (chat, [[{"role": "assistant", "content": "a"}]])
    assert evaluation.as_dialogue("q", ["a"], "text") == ("q", ["a"])
    assert evaluation.as_dialogue(transcript, ["a"], None) == (transcript, ["a"])
    with pytest.raises(ValueError):  # a guess could give wrong scores
        evaluation.as_dialogue("q", ["a"], None)
    rows = datasets.Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    data = evaluation.EvalSet("x.jsonl", "comparisons", rows, [], [])
    with pytest.raises(SystemExit, match="--prompt-format"):  # comparisons are read as in training
        evaluation.evaluate_comparisons(None, None, data, settings(prompt_format="chat"))


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


TURN = "{% for x in messages %}<|im_start|>{{ x.role }}\n{{ x.content }}<|im_end|>"


@pytest.mark.parametrize("template, eos, pad", [
    (TURN + "\n{% endfor %}", "<|im_end|>", "<pad>"),                    # ChatML
    ("{{ bos_token }}" + TURN + "\n{% endfor %}", "</s>", "<pad>"),      # Gemma
    (TURN + "{% endfor %}", "<|im_end|>", "<|im_end|>"),                 # TRL: pad is EOS
    (TURN + "{% endfor %}{{ eos_token }}", "</s>", "</s>"),
    (TURN + "\n{% endfor %}", "<|im_end|>", None)])
def test_a_chat_model_is_read_where_plain_transformers_reads(template, eos, pad, tmp_path):
    """Of `apply_chat_template(messages)`, for comparisons and for lists of responses."""
    tokenizer = toy.make_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.add_tokens(["\n"])
    tokenizer.chat_template = template
    tokenizer.eos_token = eos
    tokenizer.pad_token = pad
    pad_id = None if pad is None else tokenizer.convert_tokens_to_ids(pad)
    folder = save_reward_model(tmp_path / "model", tokenizer, pad_token_id=pad_id)

    # plain transformers, one conversation at a time
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = []
    expected = []
    for row in toy.make_comparisons("id", 6):
        question = {"role": "user", "content": row["prompt"].split(":")[1].split("\n")[0].strip()}
        answers = [{"role": "assistant", "content": row[x].strip()} for x in ("chosen", "rejected")]
        rows.append({"chosen": [question, answers[0]], "rejected": [question, answers[1]]})
        ids = [tokenizer.apply_chat_template([question, x], return_dict=False) for x in answers]
        expected.append([plain(torch.tensor([x])).logits.item() for x in ids])
    margins = np.array(expected) @ [1, -1]

    tokenizer = common.load_tokenizer(folder)
    args = settings(prompt_format="chat")
    model = common.load_reward_model(folder, tokenizer, torch.device("cpu"), args, "--reward-models")
    data = evaluation.load_set(write_rows(str(tmp_path / "rows.jsonl"), rows), None)
    record = evaluation.evaluate_comparisons(model, tokenizer, data, args)[0]
    assert record["accuracy"].tolist() == (margins > 0).tolist()
    assert record["reward_difference"] == pytest.approx(np.abs(margins), abs=1e-5)
    items = [(x["chosen"][0]["content"], [x[y][1]["content"] for y in ("chosen", "rejected")])
             for x in rows]
    rewards = evaluation.score_responses(model, tokenizer, items, "data", args)
    assert np.array(rewards) == pytest.approx(np.array(expected), abs=1e-5)


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
    assert (first["model"], second["model"], first["rows"]) == ("first0", "b", 30)
    assert second["over_first"] == pytest.approx(second["accuracy"] - first["accuracy"])
    assert "over_first" not in first
    text = Path("runs/eval/eval.md").read_text()
    assert f"{first['accuracy']:.3f} ± {first['accuracy_half']:.3f}" in text
    assert Path("runs/eval/eval.png").read_bytes()[1:4] == b"PNG"
    one = json.loads(Path("runs/eval/eval.json").read_text())
    oracle = [x["score"] for x in one if x.get("model") == "oracle"]
    assert oracle == pytest.approx([1, 5 / 3, 2])  # of n = 1, 2, 3
    Launch([str(ROOT / "eval.py"), *map(str, flags)], 2).finish()
    for x, y in zip(one, json.loads(Path("runs/eval/eval.json").read_text()), strict=True):
        assert x == pytest.approx(y, abs=1e-4)


def test_one_model_at_a_time(run, reward_models, policies, monkeypatch):
    """A judge and two reward models in bf16, which FSDP keeps in reference cycles."""
    models, alive = [], []

    def load(*args, **kwargs):
        alive.append(sum(model() is not None for model in models))
        model, missing = load_pretrained(*args, **kwargs)
        models.append(weakref.ref(model))
        return model, missing

    load_pretrained = common.load_pretrained
    monkeypatch.setattr(common, "load_pretrained", load)
    run("wins", "--reward-models", *reward_models, "--eval-data", f"id={data('id', 40)}", *policies,
        "--judge", reward_models[0], "--dtype", "bfloat16", "--max-length", 64)
    assert alive == [0, 0, 0]


def test_toy_world_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    args = evaluation.parse_args()
    paths = [Path(path) for _, path in args.reward_models + args.eval_data]
    assert len(paths) == 5 and all(path.is_absolute() and path.exists() for path in paths)


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
    found = run("policies", *policies, *GOLD)
    assert [(x["words"], x["gold"]) for x in found] == [(1, 1), (2, 0), (0, 0), (1, 1)]
    found = run("wins", *policies, *GOLD)
    expected = [(1, -1, 0), (1, -1, 0), (0, 0, 0)]
    assert [(x["lose"], x["net"], x["no_verdict"]) for x in found] == expected
    assert [x["tie"] for x in run("wins", *policies, "--judge", reward_models[0])] == [0, 0, 1]


def test_server(run, policies, monkeypatch):
    """An OpenAI-compatible server, whose `judge` maps two answers to a reply or an HTTP status."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers["Authorization"], body["model"]))
            answers = body["messages"][0]["content"].split("\n\nAnswer ")[1:]
            reply = judge(*[x[3:].split("\n\n")[0] for x in answers])
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
            # the request, too, as some servers do: its marks are no verdict
            self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}], "input": body}).encode())

    def longest(a, b):
        if len(a) == len(b):
            return "[[C]]"
        return "not [[B]], [[A]]" if len(a) > len(b) else "not [[A]], [[B]]"

    def results():
        return [(x.get("net"), x["no_verdict"]) for x in run("wins", *flags)]

    requests = []
    # or connections wait for a second
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "request_queue_size", 64)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        flags = [*policies, "--judge", url, "--judge-model", "m"]

        # all verdicts; for each policy one request comes before the others
        judge = longest
        assert results() == [(1, 0), (-1, 0), (0, 0)]
        assert requests == [("/v1/chat/completions", "Bearer key", "m")] * (3 * (1 + 2 * 8))

        # always the first answer: a tie; what fails is asked again
        replies = iter(["[[A]]", 500, 429])
        judge = lambda a, b: next(replies, "[[A]]")  # noqa: E731
        assert results() == [(0, 0)] * 3

        # missing verdicts are counted, and are in no mean and no interval
        said = [json.loads(line)["responses"][0] for line in Path("right.jsonl").open()]
        missing = said.count(said[-1])
        judge = lambda a, b: None if said[-1] in a + b else longest(a, b)  # noqa: E731
        assert 0 < missing < 7 and results() == [(1, missing), (-1, missing), (0, missing)]
        text = Path("runs/eval/eval.md").read_text()
        assert "1.000 ± 0.000" in text

        # none at all, without a mark or after the first one: an error
        for replies in (itertools.repeat("no mark"), iter(["[[A]]"])):
            judge = lambda a, b: next(replies, 500)  # noqa: E731
            with pytest.raises(SystemExit) as error:
                run("wins", *flags[:3], *flags[5:])  # two policies, so that no other one fails
            assert url in str(error.value)
        judge = lambda a, b: 400  # noqa: E731
        with pytest.raises(SystemExit, match="choices"):  # what the server says
            run("wins", *flags)
        server.shutdown()


@pytest.mark.parametrize("flags, named", [
    ("--reward-models rm", "--eval-data"), ("--policies a=said", "--policies"),
    ("--policies a=said b=said", "--gold"), ("--policies a=said b=said --gold rm", "rm"),
    ("--policies a=said b=others GOLD", "others.jsonl"),
    ("--policies a=said b=one GOLD", "one.jsonl"),
    ("--policies a=said b=silent GOLD", "silent.jsonl: row 2"),
    ("--policies a=said b=text GOLD", "text.jsonl: row 1"),
    ("--policies a=said b=said --judge http://[::1]:9", "http://[::1]:9"),
    ("--policies a=said b=said --judge words", "words"),
    ("RM x=said", "said.jsonl: row 1"), ("RM x=scores", "scores.jsonl: row 2"),
    ("RM x=nulls", "nulls.jsonl: row 1"), ("RM x=none", "none.jsonl"), ("RM x=lists", "list"),
    ("RM x=bare --prompt-format chat", "bare"), ("RM x=said --reward-models x/rm rm", "rm"),
    ("--reward-models words --eval-data x=bare", "words")])
def test_bad_input(flags, named, run, reward_models, tokenizer):
    """One line, by `fatal` or by the hook of `setup`, names what is wrong."""
    Path("rm").symlink_to(reward_models[0])
    tokenizer.save_pretrained("words")  # a folder with a tokenizer alone
    one, two = ({"prompt": row["prompt"], "responses": ["a", "b"]} for row in toy.make_comparisons("id", 2))
    files = {"said": [one, two], "others": [one, one], "one": [one],
             "silent": [one, {**two, "responses": []}],
             "text": [{**one, "responses": "a"}, {**two, "responses": "b"}],
             "bare": [{**one, "prompt": "q", "scores": [0, 1]}],
             "scores": [{**one, "scores": scores} for scores in ([1, 2], [1])],
             "nulls": [{**one, "scores": [1, None]}], "none": [{**one, "responses": []}],
             "lists": [{"prompt": "q", "chosen": ["a"], "rejected": "b"}]}
    for name, rows in files.items():
        flags = flags.replace(f"={name}", "=" + write_rows(f"{name}.jsonl", rows))
    flags = flags.replace("GOLD", " ".join(GOLD)).replace("RM", "--reward-models rm --eval-data")
    with pytest.raises((SystemExit, OSError, ValueError, ImportError, TypeError)) as error:
        run("", *flags.split())
    assert named in str(error.value)
