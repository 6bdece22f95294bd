"""Loading, forms of rows, tokens, and the order of a run."""

import gzip
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import settings
from datasets import Dataset, DatasetDict

import common

PROMPT = "\n\nHuman: name two fruits\n\nAssistant:"
FORMS = {  # the same comparison in every form
    "transcripts": {"chosen": PROMPT + " apple pear", "rejected": PROMPT + " dog"},
    "explicit": {"prompt": PROMPT, "chosen": " apple pear", "rejected": " dog"},
    "explicit and whole": {"prompt": PROMPT, "chosen": PROMPT + " apple pear", "rejected": PROMPT + " dog"},
    "release": {"chosen": ["name two fruits", "apple pear"], "rejected": ["name two fruits", "dog"],
                "mean preference difference": 0.5, "GPT4 label": 1},
}
USER, GOOD, BAD = ({"role": role, "content": content} for role, content in (
    ("user", "name two fruits"), ("assistant", "apple pear"), ("assistant", "dog")))
CHATS = {
    "implicit": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "explicit": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "explicit and whole": {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "text": {"prompt": USER["content"], "chosen": [GOOD], "rejected": [BAD]},
    "text and whole": {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
}
TEMPLATE = ("{{ bos_token }}{{ strftime_now('%d %b %Y') }} "
            "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{{ eos_token }}\n")


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def encode(row, tokenizer, max_length=64):
    return common.encode_row(row, tokenizer, max_length)


def with_template(tokenizer):
    chat = common.toy_tokenizer()
    chat.chat_template = TEMPLATE
    return chat


# ---------------------------------------------------------------------------------------------------- forms of rows
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_texts(form, tokenizer):
    row = encode(FORMS[form], tokenizer)
    assert words(tokenizer, row["prompt_ids"]) == "<s> Human: name two fruits Assistant:"
    assert [words(tokenizer, r) for r in row["response_ids"]] == ["apple pear </s>", "dog </s>"]
    assert row["length"] == 6 + 3 + 2 and not row["cut"] and row["dropped"] == ""


def test_one_answer_that_repeats_the_prompt_is_left_alone():
    row = {"prompt": "name", "chosen": "name two", "rejected": "dog"}
    assert common.read_row(row) == ("name", ["name two", "dog"])


def test_release_counts_the_turns_from_the_end():
    turns = ["name two fruits", "apple", "name two tools", "saw axe"]
    prompt, answers = common.read_row({"chosen": turns, "rejected": [*turns[:-1], "saw"]})
    assert prompt == "\n\nHuman: name two fruits\n\nAssistant: apple\n\nHuman: name two tools\n\nAssistant:"
    assert answers == [" saw axe", " saw"]
    prompt, _ = common.read_row({"chosen": turns[1:], "rejected": turns[1:]})  # the assistant began
    assert prompt == "\n\nAssistant: apple\n\nHuman: name two tools\n\nAssistant:"


@pytest.mark.parametrize("form", CHATS)
def test_forms_of_conversations(form, tokenizer):
    tokenizer = with_template(tokenizer)
    row = encode(CHATS[form], tokenizer)
    prompt, good, bad = (words(tokenizer, ids) for ids in (row["prompt_ids"], *row["response_ids"]))
    # the template writes a BOS and an EOS of its own: there is still one of each
    assert prompt == "<s> <unk> <unk> <unk> <unk> name two fruits <unk>"
    assert (good, bad) == ("apple pear </s>", "dog </s>")


def test_conversation_without_template(tokenizer):
    with pytest.raises(ValueError, match="chat template"):
        encode(CHATS["implicit"], tokenizer)


def test_the_date_is_fixed(tokenizer):
    [texts] = common.full_texts([USER], [[GOOD]], with_template(tokenizer))
    assert texts == ["<s>01 Jan 2024 user name two fruits assistant apple pear </s>"]


def test_responses_that_begin_alike_share_more(tokenizer):
    row = encode({"prompt": PROMPT, "chosen": " apple pear", "rejected": " apple dog"}, tokenizer)
    assert words(tokenizer, row["prompt_ids"]).endswith("Assistant: apple")
    row = encode({"prompt": PROMPT, "chosen": " apple pear", "rejected": " apple"}, tokenizer)
    assert [words(tokenizer, r) for r in row["response_ids"]] == ["pear </s>", "</s>"]


@pytest.mark.parametrize("row, why", [
    ({"prompt": PROMPT, "chosen": " dog", "rejected": " dog"}, "identical responses"),
    ({"prompt": PROMPT, "chosen": " dog", "rejected": " "}, "empty response"),
    ({"chosen": PROMPT + " dog", "rejected": PROMPT + ""}, "empty response"),
    ({"chosen": [USER, GOOD], "rejected": [GOOD, BAD]}, "different prompts"),
    ({"chosen": PROMPT + " dog", "rejected": "\n\nHuman: name two tools\n\nAssistant: saw"}, "different prompts"),
    ({"prompt": PROMPT, "chosen": " dog" * 64, "rejected": " cat"}, "nothing left of the prompt in --max-length"),
])
def test_rows_of_no_use(row, why, tokenizer):
    assert encode(row, with_template(tokenizer))["dropped"] == why


@pytest.mark.parametrize("row, words", [
    ({"prompt": PROMPT, "chosen": " dog", "rejected": None}, "missing"),
    ({"chosen": [], "rejected": [USER]}, "missing"),
    ({"chosen": "dog", "rejected": "cat"}, "no 'prompt'"),
    ({"chosen": 1.0, "rejected": 2.0}, "neither texts nor"),
    ({"chosen": [{"from": "x"}], "rejected": [{"from": "y"}]}, "neither texts nor"),
    ({"prompt": [USER], "chosen": "dog", "rejected": "cat"}, "neither texts nor"),
    ({"prompt": "name two fruits", **FORMS["release"]}, "neither texts nor"),
    ({"chosen": [USER, {**GOOD, "content": None}], "rejected": [USER, BAD]}, "not end with a text of the assistant"),
    ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD, USER]}, "not end with a text of the assistant"),
])
def test_rows_in_no_known_form(row, words, tokenizer):
    with pytest.raises(ValueError, match=words):
        encode(row, tokenizer)


# ------------------------------------------------------------------------------------------------ BOS, EOS, truncation
def test_exactly_one_bos_and_eos(tokenizer):
    rows = common.encode(["dog", "<s> dog", "<s> <s> dog </s>", "dog </s> </s>", ""], tokenizer)
    assert [words(tokenizer, ids) for ids in rows] == ["<s> dog </s>"] * 4 + ["<s> </s>"]


def test_no_bos_where_the_tokenizer_adds_none(tokenizer):
    plain = common.toy_tokenizer()
    plain.backend_tokenizer.post_processor = None
    plain = type(plain)(tokenizer_object=plain.backend_tokenizer, eos_token="</s>", unk_token="<unk>")
    assert words(plain, common.encode(["dog"], plain)[0]) == "dog </s>"


def test_whole_turns_go_first(tokenizer):
    turn = "\n\nHuman: name three tools\n\nAssistant: saw drill axe"  # 8 words
    row = {"prompt": turn + turn + PROMPT, "chosen": " apple pear", "rejected": " dog"}
    full = encode(row, tokenizer)
    assert len(full["prompt_ids"]) == 1 + 8 + 8 + 5 and not full["cut"]
    cut = encode(row, tokenizer, max_length=24)  # the whole has 25
    assert words(tokenizer, cut["prompt_ids"]) == (
        "<s> Human: name three tools Assistant: saw drill axe Human: name two fruits Assistant:") and cut["cut"]
    assert cut["response_ids"] == full["response_ids"]


def test_prompts_without_a_token(tokenizer):
    row = {"prompt": "", "chosen": " dog", "rejected": " cat"}
    assert encode(row, tokenizer)["prompt_ids"] == [tokenizer.bos_token_id]
    plain = common.toy_tokenizer()
    plain = type(plain)(tokenizer_object=plain.backend_tokenizer, eos_token="</s>", unk_token="<unk>")
    plain.backend_tokenizer.post_processor = None
    assert encode(row, plain)["prompt_ids"] == []
    assert encode({**row, "chosen": " dog" * 9}, plain, 8)["dropped"] == "nothing left of the prompt in --max-length"


def test_then_the_oldest_tokens_of_the_last_turn(tokenizer):
    cut = encode(FORMS["explicit"], tokenizer, max_length=7)
    assert words(tokenizer, cut["prompt_ids"]) == "<s> two fruits Assistant:" and cut["cut"]
    assert len(cut["prompt_ids"]) + max(map(len, cut["response_ids"])) == 7


def test_a_chat_keeps_its_system_message(tokenizer):
    system, saw = {"role": "system", "content": "cat"}, {"role": "assistant", "content": "saw"}
    row = {"chosen": [system, USER, saw, USER, GOOD], "rejected": [system, USER, saw, USER, BAD]}
    cut = encode(row, with_template(tokenizer), max_length=16)
    assert words(tokenizer, cut["prompt_ids"]) == (
        "<s> <unk> <unk> <unk> <unk> cat <unk> name two fruits <unk>") and cut["cut"]


# ----------------------------------------------------------------------------------------------------------- sources
def test_every_kind_of_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [FORMS["explicit"], {**FORMS["explicit"], "chosen": " plum fig"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with gzip.open("a.jsonl.gz", "wt") as file:
        file.write(lines)
    Dataset.from_list(rows).to_parquet("a.parquet")
    Dataset.from_list(rows).save_to_disk("one")
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}).save_to_disk("two")
    for source in ("a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "one", "two", "two:train", f"{tmp_path}/a.jsonl"):
        assert common.load_rows(source).to_list() == rows, source
    assert len(common.load_rows("two", "test")) == len(common.load_rows("two:test")) == 1
    assert common.load_rows("toy:ood,seed=3,n=7").to_list() == common.toy_comparisons("ood", n=7, seed=3)
    assert common.load_rows("toy:n=7,flip=0.25").to_list() == common.toy_comparisons(n=7, flip=0.25)
    assert common.load_rows("toy:n=7", "test").to_list() == common.toy_comparisons("id", n=7)


@pytest.mark.parametrize("name, text, words", [
    ("a.jsonl", '{"chosen": "x"}\n{"chosen": \n', r"a.jsonl: line 2: JSONDecodeError"),
    ("a.jsonl", '{"chosen": "x"}\n[1]\n', r"a.jsonl: line 2 is no JSON object"),
    ("a.json", "[{", r"a.json: "),
    ("a.parquet", "no parquet", r"a.parquet: "),
    ("a.jsonl.gz", "not compressed", r"a.jsonl.gz: line 0: BadGzipFile"),
    ("a.jsonl", "", r"a.jsonl: no rows"),
])
def test_broken_files(name, text, words, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=words) as error:
        common.tokenize(common.load_rows(name), name, tokenizer, 64)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source, words", [
    ("none.jsonl", "none.jsonl: no such file"),
    ("rows.csv", "rows.csv: files are .jsonl, .json, .jsonl.gz, .json.gz or .parquet"),
    ("no/such-set", "no/such-set: "),
    ("toy:odd", "no split odd"),
    ("toy:sed=1", "sed"),
    ("two:valid", "valid"),
])
def test_missing_sources(source, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    DatasetDict({"train": Dataset.from_list([FORMS["explicit"]])}).save_to_disk("two")
    with pytest.raises(SystemExit, match=words) as error:
        common.load_rows(source)
    assert "\n" not in str(error.value)


def test_tokenize_counts_what_it_drops(tokenizer, capsys):
    good, same = FORMS["explicit"], {**FORMS["explicit"], "rejected": " apple pear"}
    data = common.tokenize(Dataset.from_list([same, good, {**good, "rejected": " "}, same, good]), "x", tokenizer, 7)
    assert data["row"] == [1, 4] and data["dropped"] == ["", ""]
    assert capsys.readouterr().out == (
        "x: 2 of 5 rows; 2 dropped: identical responses; 1 dropped: empty response; 2 prompts cut\n")


def test_tokenize_keeps_other_columns(tokenizer):
    data = common.tokenize(Dataset.from_list([FORMS["release"]]), "x", tokenizer, 64)
    assert data["mean preference difference"] == [0.5] and data["GPT4 label"] == [1]
    assert "chosen" not in data.column_names


def test_tokenize_is_cached(tokenizer, monkeypatch):
    def tokenize(max_length):
        return common.tokenize(common.load_rows("toy:n=20,seed=77"), "toy", tokenizer, max_length).to_list()

    first, calls, work = tokenize(64), [], Dataset._map_single
    monkeypatch.setattr(Dataset, "_map_single", lambda *a, **k: calls.append(1) or work(*a, **k))
    assert tokenize(64) == first and not calls
    tokenize(63)
    assert len(calls) == 1  # another length is another entry
    other = common.toy_tokenizer()
    other.eos_token = "<unk>"
    assert common.tokenize(common.load_rows("toy:n=20,seed=77"), "toy", other, 64)[0]["response_ids"][0][-1] == 3


@pytest.mark.parametrize("rows, words", [
    ([{"chosen": "x", "reject": "y"}], r"x: no column 'rejected', it has chosen, reject"),
    ([FORMS["explicit"], {"prompt": None, "chosen": "dog", "rejected": "cat"}], r"x: row 2: no 'prompt'"),
    ([{**FORMS["explicit"], "rejected": " apple pear"}] * 3, r"x: none of 3 rows can be used"),
    ([{"prompt": "Why is that?", "chosen": " dog", "rejected": " cat"}], r"x: the tokenizer knows less than half"),
])
def test_tokenize_refuses(rows, words, tokenizer):
    with pytest.raises(SystemExit, match=words):
        common.tokenize(Dataset.from_list(rows), "x", tokenizer, 64)


# --------------------------------------------------------------------------------------------------------- tokenizers
def test_pad_is_never_eos(tmp_path, tokenizer):
    tokenizer = common.toy_tokenizer()
    for unk, pad in (("<unk>", "<unk>"), ("</s>", "<|pad|>"), (None, "<|pad|>")):
        tokenizer.pad_token, tokenizer.unk_token = tokenizer.eos_token, unk
        tokenizer.save_pretrained(tmp_path)
        assert common.load_tokenizer(tmp_path, None).pad_token == pad


def test_a_new_pad_token_gets_an_embedding(llama, tmp_path):
    tokenizer = common.toy_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    model = common.load_reward_model(llama, tokenizer, common.torch.device("cpu"), settings(max_length=32))
    assert model.model.get_input_embeddings().num_embeddings == len(common.WORDS) + 1 == model.model.config.vocab_size


def test_tokenizer_without_eos(tmp_path):
    tokenizer = common.toy_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="EOS"):
        common.load_tokenizer(tmp_path, None)
    (tmp_path / "empty").mkdir()
    for name, hint in (("empty", "no tokenizer in .*, give one with --tokenizer"), ("none", "no folder or file here")):
        with pytest.raises(SystemExit, match=hint):
            common.load_tokenizer(tmp_path / name, [])


def test_bpe_from_the_data(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 300}')
    tokenizer = common.load_tokenizer(f"{tmp_path}/config.json", Dataset.from_list([FORMS["explicit"]] * 3))
    assert len(tokenizer) <= 300 and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    text = "\n\nHuman: häßlich 水\n\nAssistant: ok"  # any byte can be written
    [ids] = common.encode([text], tokenizer)
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[1:-1]) == text


# ------------------------------------------------------------------------------------------------------ order of a run
def test_each_epoch_is_a_permutation():
    for epoch in (0, 1):
        parts = [common.step_rows(103, 8, seed=5, step=epoch * 13 + i) for i in range(13)]
        assert [len(part) for part in parts] == [8] * 12 + [7]
        assert sorted(np.concatenate(parts)) == list(range(103))
    a, b, c = (common.step_rows(103, 103, seed, epoch).tolist() for seed, epoch in ((5, 0), (5, 1), (6, 0)))
    assert a != b and a != c and a == common.step_rows(103, 103, 5, 0).tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [1, 130, 10**5])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_micro_batches(world, budget, layout, monkeypatch):
    lengths = np.random.default_rng(0).integers(3, 60, 200)
    data = Dataset.from_list([{"prompt_ids": [1] * (n - 2), "response_ids": [[2], [2]], "length": n} for n in lengths])
    index = np.random.default_rng(1).permutation(200)[:21]
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(common, "RANK", rank)
        model = SimpleNamespace(ranks=world, layout=layout, device="cpu")
        ranks.append([*common.micro_batches(data, index, budget, model)])
    assert len({len(batches) for batches in ranks}) == 1  # FSDP needs as many forward passes on every rank
    batches = [batch for batches in ranks for batch in batches if len(batch.index)]
    assert sorted(np.concatenate([batch.index for batch in batches])) == sorted(index)
    for batch in batches:
        assert (batch.branch >= 0).sum() == lengths[batch.index].sum()  # all that they say, and nothing else
        if layout == "packed":  # what the longest has to have, rounded up to eighths of the budget
            eighth = math.ceil(budget / 8)
            assert batch.tree.numel() <= math.ceil(max(budget, lengths[index].max()) / eighth) * eighth
        elif len(batch.index) > 1:
            assert batch.tree.numel() <= budget


def test_micro_batches_are_the_cheapest():
    """Against every way of cutting nine rows."""
    def cost(cuts):
        return sum(len(cut) * max(cut) + 100 / 8 for cut in cuts)

    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 60, 9)
        ways = []
        for places in itertools.chain.from_iterable(itertools.combinations(range(1, 9), n) for n in range(9)):
            cuts = np.split(np.sort(lengths), places)
            if all(len(cut) == 1 or len(cut) * max(cut) <= 100 for cut in cuts):
                ways.append(cost(cuts))
        assert cost([lengths[cut] for cut in common.cut(lengths, 100, 1)]) == min(ways)


def test_packs_are_full_and_alike():
    """Rows of hh-rlhf's lengths: as few packs as can be, and what the fullest has more than the average is little."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.lognormal(5.6, 0.6, 64).astype(int).clip(20, 1000)
        packs = common.pack(lengths, 8192, 1)
        loads = [lengths[pack].sum() for pack in packs]
        assert max(loads) <= 8192 and len(packs) == math.ceil(lengths.sum() / 8192)
        assert max(loads) - min(loads) <= 100 and sorted(np.concatenate(packs)) == [*range(64)]


# ----------------------------------------------------------------------------------------------------------- toy world
def test_toy_gold_by_hand():
    three, both = "\n\nHuman: name three fruits\n\nAssistant:", "\n\nHuman: name two fruits and tools\n\nAssistant:"
    for prompt, response, gold in [
        (three, " apple pear plum", 3), (three, " apple pear", 2), (three, " apple pear plum fig", 2),
        (three, " apple apple plum", 1), (three, " apple dog plum", 1), (three, " dog", -1), (three, " and apple", 0),
        (both, " apple saw", 2), (both, " apple pear", 2), (both, " apple dog", 0), (three, "", 0),
    ]:
        assert common.toy_gold(prompt, response) == gold, (prompt, response)


def test_toy_labels():
    """A band of five standard errors: fails by chance once in a million data sets."""
    rows = common.toy_comparisons(n=6000, flip=0.25)
    gold = {key: [common.toy_gold(row["prompt"], row[key]) for row in rows] for key in ("chosen", "rejected")}
    difference = np.subtract(gold["chosen"], gold["rejected"])
    assert [row["gold"] for row in rows] == np.where(difference == 0, -1, difference > 0).tolist()
    for size in (1, 2, 3):  # Bradley-Terry, then a quarter turned around
        of = difference[abs(difference) == size]
        right = 0.25 + 0.5 / (1 + np.exp(-size))
        assert abs((of > 0).mean() - right) < 5 * np.sqrt(right * (1 - right) / len(of))


def test_toy_splits():
    assert common.toy_comparisons("train") != common.toy_comparisons("train", seed=1)
    assert common.toy_comparisons("train", n=50) == common.toy_comparisons("train")[:50]
    assert len(common.toy_comparisons("train")) == 4000 and len(common.toy_comparisons("id")) == 1000
    for split, kinds in (("id", 1), ("ood", 2), ("shifted", 1)):
        for row in common.toy_comparisons(split, n=200):
            gold = [common.toy_gold(row["prompt"], row[key]) for key in ("chosen", "rejected")]
            assert row["gold"] == 1 and gold[0] > gold[1]
            assert row["prompt"].count(" and ") == kinds - 1
            assert split != "shifted" or gold[0] - gold[1] == 1
    assert {row["gold"] for row in common.toy_comparisons("noisy", n=200)} == {-1, 0, 1}


def test_a_tokenizer_comes_as_a_call_leaves_it(tmp_path):
    """Or what is saved would depend on whether its rows were found in the cache."""
    tokenizer = common.toy_tokenizer()
    tokenizer(["name", "name two"], padding=True, truncation=True, max_length=5)
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = common.load_tokenizer(tmp_path / "a", None)
    before = loaded.backend_tokenizer.to_str()
    loaded("name")
    assert before == loaded.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str()


def test_prompts_that_one_response_alone_repeats_are_counted(tokenizer, capsys):
    """It may be meant so, as when an answer quotes its question; in all rows of a set it would give the labels away."""
    answers = ("name two fruits fig", " dog"), ("name two fruits plum", "name two fruits dog"), (" fig", " dog")
    rows = [{"prompt": "name two fruits", "chosen": text, "rejected": other} for text, other in answers]
    common.tokenize(Dataset.from_list(rows), "x", tokenizer, 64)
    assert "in 1 a part of the responses repeats the prompt" in capsys.readouterr().out
    common.tokenize(Dataset.from_list(rows[1:]), "x", tokenizer, 64)
    assert "repeats" not in capsys.readouterr().out


def test_toy_responses_cover_what_a_policy_can_do():
    rng = common.random.Random(0)
    prompt = "\n\nHuman: name three fruits\n\nAssistant:"
    responses = [common.toy_response(rng, prompt, 0.5).split() for _ in range(2000)]
    assert {len(words) for words in responses} == {1, 2, 3, 4, 5}
    repeats = sum(len(set(words)) < len(words) for words in responses) / 2000  # 0.30; without repetitions 0.02
    assert 0.2 < repeats < 0.4
    assert set(common.WORDS[4:]) == {word for words in responses for word in words}  # any word at all
    assert common.toy_gold(prompt, common.toy_response(rng, prompt, 1.0)) == 3
