"""Files, forms of rows, tokens, and the toy world."""

import gzip
import json
import os

import numpy as np
import pytest
from conftest import ROOT, toy
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import common

TEXT = "\n\nHuman: name two fruits\n\nAssistant:"
USER, GOOD, BAD = ({"role": role, "content": content} for role, content in (
    ("user", "name two fruits"), ("assistant", "apple pear"), ("assistant", "dog")))
TEXT_FORMS = {  # one comparison in every form
    "hh-rlhf": {"chosen": TEXT + " apple pear", "rejected": TEXT + " dog"},
    "prompt": {"prompt": TEXT, "chosen": " apple pear", "rejected": " dog"},
    "repeated prompt": {"prompt": TEXT, "chosen": TEXT + " apple pear", "rejected": TEXT + " dog"},
    "repeated without blank lines": {
        "prompt": TEXT.strip(), "chosen": TEXT + " apple pear", "rejected": TEXT + " dog"},
    "null prompt": {"prompt": None, "chosen": TEXT + " apple pear", "rejected": TEXT + " dog"},
    "authors' release": {"chosen": ["name two fruits", "apple pear"], "rejected": ["name two fruits", "dog"],
                         "mean preference difference": 0.5, "GPT4 label": 1},
    "responses": {"prompt": TEXT, "responses": [" apple pear", " dog"]},
}
CHAT_FORMS = {
    "no prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "prompt": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "repeated prompt": {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "text": {"prompt": USER["content"], "chosen": [GOOD], "rejected": [BAD]},
    "repeated text": {"prompt": USER["content"] + "\n", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "responses": {"prompt": [USER], "responses": [[GOOD], [BAD]]},
}
SYSTEM = {"role": "system", "content": "be brief"}
EARLIER = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}\n{% endfor %}"


def tokenize(rows, tokenizer, max_length=64):
    return common.tokenize(Dataset.from_list(rows), "x.jsonl", tokenizer, max_length, k=None)


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


# ------------------------------------------------------------------------------------------------------- forms of rows
@pytest.mark.parametrize("form", TEXT_FORMS)
def test_text_forms(form, tokenizer):
    [row] = tokenize([TEXT_FORMS[form]], tokenizer)
    assert words(tokenizer, row["prompt_ids"]) == "<s> Human: name two fruits Assistant:"
    assert [words(tokenizer, ids) for ids in row["response_ids"]] == ["apple pear </s>", "dog </s>"]
    assert row["length"] == 6 + 3 + 2 and row["row"] == 0 and row.get("GPT4 label", 1) == 1


@pytest.mark.parametrize("form", CHAT_FORMS)
def test_chat_forms(form):
    """One BOS, and one EOS at the end, although the template writes both; the EOS after another message stays."""
    chat = toy.make_tokenizer()
    chat.chat_template = TEMPLATE
    [row] = tokenize([CHAT_FORMS[form]], chat)
    assert words(chat, row["prompt_ids"]) == "<s> <unk> name two fruits </s> <unk>"
    assert [words(chat, ids) for ids in row["response_ids"]] == ["apple pear </s>", "dog </s>"]


def test_read_row():
    turns = ["apple", "name two tools"]  # the authors' release, where the last turn is always the assistant's
    prompt, responses = common.read_row({"chosen": [*turns, "saw axe"], "rejected": [*turns, "saw"]})
    assert prompt == "\n\nAssistant: apple\n\nHuman: name two tools\n\nAssistant:"
    assert responses == [" saw axe", " saw"]
    row = {"prompt": "name", "chosen": "name two", "rejected": "dog"}  # one response just quotes
    assert common.read_row(row) == ("name", ["name two", "dog"])
    row = {"prompt": "Say:", "chosen": "Say: well", "rejected": "Say:"}  # one answer is empty
    assert common.read_row(row) == ("Say:", [" well", ""])
    row = {"prompt": "[q]", "chosen": "[q]well", "rejected": "[q]fine"}  # no white space, and yet repeated
    assert common.read_row(row) == ("[q]", ["well", "fine"])
    assert common.read_row({**row, "chosen": "well"}) == ("[q]", ["well", "[q]fine"])
    row = {"prompt": "Hello", "chosen": "Hello! I am well.", "rejected": "Hello."}  # both greet
    assert common.read_row(row) == ("Hello", [row["chosen"], row["rejected"]])


@pytest.mark.parametrize("prompt, repeated, whole", [
    (USER["content"], [SYSTEM, USER], [SYSTEM, USER]),  # the prompt stands inside of the conversation
    ([SYSTEM, USER], [USER], [SYSTEM, USER]),  # its last turn is repeated
    ([SYSTEM, *EARLIER, USER], [EARLIER[1], USER], [SYSTEM, *EARLIER, USER]),  # its last turns
    ([SYSTEM], [USER], [SYSTEM, USER]),
    (EARLIER, [USER], [*EARLIER, USER]),
    ([USER, EARLIER[1]], [USER], [USER, EARLIER[1], USER]),  # the same question is asked again
    ([USER, EARLIER[1], USER], [USER, EARLIER[1], USER], [USER, EARLIER[1], USER]),  # the same, repeated whole
    ([USER], [EARLIER[1], USER], [USER, EARLIER[1], USER]),  # an answer, and then the same question
])
def test_turns_that_prompt_and_responses_share_stand_once(prompt, repeated, whole):
    row = {"prompt": prompt, "chosen": [*repeated, GOOD], "rejected": [*repeated, BAD]}
    assert common.read_row(row) == (whole, [[GOOD], [BAD]])


def test_turns_with_tools():
    """Turns that call different tools differ, also without words. Other keys, and null values, do not count. A call is
    an answer."""
    def call(name, **more):
        return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": "{}"}}], **more}

    apple, pear = call("apple"), call("pear", content=None)
    row = {"prompt": [USER, apple], "chosen": [apple, GOOD], "rejected": [{**apple, "content": "", "score": 1}, BAD]}
    assert common.read_row(row) == ([USER, apple], [[GOOD], [BAD]])
    other = [{**USER, "score": 1}, apple, BAD]
    assert common.read_row({"chosen": [USER, apple, GOOD], "rejected": other}) == ([USER, apple], [[GOOD], [BAD]])
    assert common.read_row({**row, "rejected": [pear, BAD]})[0] is None
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "{% for x in messages %}{{ x.content or x.tool_calls[0].function.name }} {% endfor %}"
    [row] = tokenize([{"chosen": [USER, apple], "rejected": [USER, pear]}], tokenizer)
    assert [words(tokenizer, ids) for ids in row["response_ids"]] == ["apple", "pear"]


@pytest.mark.parametrize("row", [
    {"prompt": TEXT, "chosen": " dog"},
    {"chosen": [{"from": "x", "value": "y"}], "rejected": [{"from": "x", "value": "z"}]},
    {"conversations": [{"from": "x", "value": "y"}], "chosen": {"from": "x", "value": "y"}},
    {"question": "name two fruits", "response_j": " fig", "response_k": " dog"},
    {"data": [TEXT]},
    {"chosen": ["name two fruits", None], "rejected": ["name two fruits", " dog"]},
    {"prompt": TEXT, "responses": "ab"},
    {"prompt": TEXT, "chosen": [" dog"], "rejected": [" fig", " saw", " axe"]},  # lists of answers, not of turns
    {"chosen": [USER, GOOD, USER], "rejected": [USER, BAD, USER]},
    CHAT_FORMS["prompt"],  # a tokenizer without a chat template
])
def test_unknown_forms_name_the_row(row, tokenizer):
    with pytest.raises(SystemExit, match="^error: x.jsonl: row 1: "):
        tokenize([row], tokenizer)


@pytest.mark.parametrize("row", [
    {"prompt": "another question", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": [SYSTEM, USER], "chosen": [{**SYSTEM, "content": "be kind"}, USER, GOOD], "rejected": [USER, BAD]},
    dict.fromkeys(("chosen", "rejected"), [{**x, "content": [{"type": "text", "text": "q"}]} for x in (USER, GOOD)]),
    {"chosen": [USER, {**GOOD, "tool_calls": [{"name": "apple"}]}], "rejected": [USER, BAD]},
])
def test_conversations_that_would_be_read_wrongly(row):
    """A prompt that is not in the conversation; parts that are not text, and tools, which the template cannot write."""
    chat = toy.make_tokenizer()
    chat.chat_template = TEMPLATE
    with pytest.raises(SystemExit, match="^error: x.jsonl: row 1: "):
        tokenize([row], chat)


def test_unusable_rows_are_dropped_and_counted(tokenizer, capsys):
    """Each for its own reason."""
    good, other = TEXT_FORMS["hh-rlhf"], "\n\nHuman: name two tools\n\nAssistant: saw"
    bad = [{**good, "rejected": x} for x in (
        good["chosen"], TEXT + "  apple  pear", TEXT + " ", None, other, TEXT + " dog" * 64)]
    common.print_once.cache_clear()
    data = tokenize([bad[0], good, *bad[1:], good], tokenizer, 7)
    assert data["row"][:] == [1, 7] and data["truncated"][:] == [True, True]
    line = capsys.readouterr().out
    for count in ("2 with equal responses", "2 empty", "1 with different prompts", "1 without room for the prompt"):
        assert count in line
    assert words(tokenizer, data[0]["response_ids"][0]) in line  # the first example, as it is read
    pair = {"chosen": " dog", "rejected": " fig"}
    for row in ({"prompt": None, **pair}, {"prompt": "", **pair}, {"prompt": TEXT, "responses": []},
                {"prompt": TEXT, "responses": [" fig"]}, {"chosen": None, "rejected": [USER, GOOD]}, *bad):
        with pytest.raises(SystemExit, match="^error: x.jsonl: no row"):
            tokenize([row], tokenizer)
    with pytest.raises(SystemExit, match="^error: x.jsonl: .*--model"):  # a tokenizer that knows no such words
        tokenize([{"prompt": "Why is that?", "chosen": " dog", "rejected": " cat"}], tokenizer)


def test_responses_that_a_template_makes_equal_are_dropped():
    chat = toy.make_tokenizer()
    chat.chat_template = TEMPLATE.replace("m.content", "m.content.split('thinks')[-1]")
    thinking = {"role": "assistant", "content": "dog thinks apple pear"}
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [thinking]}
    with pytest.raises(SystemExit):
        tokenize([row], chat)


# -------------------------------------------------------------------------------------------------- tokens, truncation
@pytest.mark.parametrize("adds_bos", [True, False])
def test_exactly_one_bos_and_eos(adds_bos):
    """Also if the text brings them; an EOS inside of it stays."""
    tokenizer = toy.make_tokenizer()
    if not adds_bos:
        tokenizer.backend_tokenizer.post_processor = None
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    for prompt, response in (("name", " dog"), ("<s> name", " dog"), ("name", " dog </s>"), ("name", " dog </s> cat"),
                             ("name", " dog </s>\n"), ("name", " dog </s> </s> \n")):
        [row] = tokenize([{"prompt": prompt, "chosen": response, "rejected": " fig"}], tokenizer)
        expected = f"{prompt}{response}".removeprefix("<s> ").rstrip("\n </s>") + " </s>"
        if adds_bos or "<s>" in prompt:
            expected = "<s> " + expected
        assert words(tokenizer, row["prompt_ids"] + row["response_ids"][0]) == expected


def test_tokens_are_those_of_the_full_texts():
    """Also where a token of the full text reaches across the end of the prompt."""
    bpe, rows = Tokenizer(models.BPE()), toy.make_comparisons(n=50)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.train_from_iterator((row["prompt"] + row["chosen"] for row in rows), trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    for row, found in zip(rows, tokenize(rows, bpe, 512)):
        for key, response in zip(("chosen", "rejected"), found["response_ids"]):
            assert found["prompt_ids"] + response == bpe(row["prompt"] + row[key] + "</s>").input_ids


@pytest.mark.parametrize("k", [2, 3])
def test_truncation_keeps_bos_and_the_newest_tokens(k, tokenizer):
    responses = [" pear", " dog cat", " apple plum fig kiwi"][-k:]
    row = {"prompt": "\n\nHuman: name three tools\n\nAssistant: saw" + TEXT, "responses": responses}
    prompt = "Human: name three tools Assistant: saw Human: name two fruits Assistant:".split()
    for max_length in range(7, 20):  # with BOS and EOS, the longest text has 17 tokens
        [found] = tokenize([row], tokenizer, max_length)
        assert words(tokenizer, found["prompt_ids"]).split() == ["<s>", *prompt[max(0, 17 - max_length):]]
        assert [words(tokenizer, ids) for ids in found["response_ids"]] == [f"{x.strip()} </s>" for x in responses]
        assert max(len(found["prompt_ids"]) + len(ids) for ids in found["response_ids"]) == min(17, max_length)
        assert found["truncated"] == (max_length < 17)
    pytest.raises(SystemExit, tokenize, [row], tokenizer, 6)  # the prompt would be a BOS alone


def test_a_tokenizer_that_adds_eos_itself():
    tokenizer = toy.make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    [row] = tokenize([TEXT_FORMS["prompt"]], tokenizer)
    assert words(tokenizer, row["prompt_ids"]) == "<s> Human: name two fruits Assistant:"
    assert words(tokenizer, row["response_ids"][0]) == "apple pear </s>"


def test_a_response_that_begins_another_keeps_a_token(tokenizer):
    prompt_ids, response_ids, _ = common.encode(TEXT, [" apple", " apple </s> pear"], tokenizer, 64)
    assert words(tokenizer, prompt_ids) == "<s> Human: name two fruits Assistant: apple"
    assert [words(tokenizer, ids) for ids in response_ids] == ["</s>", "</s> pear </s>"]


@pytest.mark.parametrize("end, expected", [
    ("{{ eos_token }}", "</s>"), ("{{ eos_token }} saw", "</s> saw"), (" dog dog", "dog dog"), ("", "")])
def test_a_conversation_ends_as_its_template_ends_it(end, expected):
    """Also where PPO puts the end behind a sampled response."""
    chat = toy.make_tokenizer()
    chat.chat_template = "{% for m in messages %} {{ m.content }}" + end + "{% endfor %}"
    prompt_ids, response_ids, _ = common.encode([USER], [[GOOD], [BAD]], chat, 64)
    assert words(chat, response_ids[0]) == f"apple pear {expected}".strip()
    assert words(chat, common.end_ids(chat, is_chat=True)) == expected
    assert words(chat, common.end_ids(chat, is_chat=False)) == "</s>"
    template_ids = chat.apply_chat_template([USER, GOOD], return_dict=False)
    assert prompt_ids + response_ids[0] == template_ids


def test_padding_with_eos_means_reading_before_it():
    """As transformers' classifiers do: see test_other_reward_models in test_eval.py."""
    tokenizer = toy.make_tokenizer()
    tokenizer.pad_token = "</s>"
    _, response_ids, _ = common.encode(TEXT, [" apple pear", " dog"], tokenizer, 64)
    assert [words(tokenizer, ids) for ids in response_ids] == ["apple pear", "dog"]
    assert common.end_ids(tokenizer, is_chat=False) == []


@pytest.mark.parametrize("date", ["strftime_now('%d %b %Y')", "now('(%d) %b %Y')"])
def test_the_date_is_fixed(date):
    """Also under another name, also if the tokenizer has several templates."""
    template = "{% set now = strftime_now %}{{ " + date + " }} " + TEMPLATE
    for chat_template in (template, {"default": template, "tools": template}):
        tokenizer = toy.make_tokenizer()
        tokenizer.chat_template = chat_template
        assert common.render([USER], tokenizer).startswith("01 Jan 2024 <s>user name")


def test_pad_is_eos_only_for_a_reward_model_that_was_trained_so(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    for architecture, pad, expected in (
            ("LlamaForCausalLM", None, "<|pad|>"), ("LlamaForCausalLM", 2, "<|pad|>"),
            ("LlamaForSequenceClassification", None, "<|pad|>"), ("LlamaForSequenceClassification", 2, "</s>")):
        for saved_pad in (None, "</s>"):
            tokenizer = AutoTokenizer.from_pretrained(llama)
            tokenizer.pad_token = saved_pad
            tokenizer.save_pretrained(tmp_path)
            text = json.dumps({**config, "architectures": [architecture], "pad_token_id": pad})
            (tmp_path / "config.json").write_text(text)
            assert common.load_tokenizer(tmp_path).pad_token == expected


def test_a_tokenizer_does_not_change_by_its_calls():
    """Its state is part of the cache's key, and is saved with the model; this file asks for padding."""
    tokenizer = common.load_tokenizer(ROOT / "docs/toy/model")
    before = tokenizer.backend_tokenizer.to_str()
    tokenizer(["a", "b c"])
    assert tokenizer.backend_tokenizer.to_str() == before


# -------------------------------------------------------------------------------------------------- sources, toy world
def test_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [TEXT_FORMS["prompt"], {**TEXT_FORMS["prompt"], "chosen": " plum fig"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "folder.parquet/a.jsonl").write_text(lines)
    Dataset.from_list(rows).to_parquet("a.parquet")
    for source in ("a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", f"{tmp_path}/a.jsonl"):
        assert common.load_rows(source).to_list() == rows, source
    tokenizer, other = toy.make_tokenizer(), toy.make_tokenizer()
    other.eos_token = "<unk>"
    for args, length, eos in (((tokenizer, 64), 11, 2), ((tokenizer, 8), 10, 2), ((other, 64), 11, 3)):
        [row, _] = common.tokenize(common.load_rows("a.jsonl"), "a.jsonl", *args)  # which is cached
        assert row["length"] == length and row["response_ids"][0][-1] == eos
    for source in ("none.jsonl", "empty.jsonl", "no/such-set", "no/such-set:config:test", "folder.parquet"):
        with pytest.raises(SystemExit, match=f"^error: {source}: "):
            common.load_rows(source)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, split: [(args, split)])
    assert common.load_rows("a/set:config:test[5:9]") == [(("a/set", "config"), "test[5:9]")]
    assert common.load_rows("a/set:train[:9]") == [(("a/set",), "train[:9]")]
    assert common.load_rows("a/set") == [(("a/set",), "train")]


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "a?.jsonl", "a:3.jsonl", "a b.json"])
def test_the_file_that_was_named(name, tmp_path, monkeypatch):
    """Whatever a glob or a hub id would make of its name; also if another takes its place within its time stamp."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a1.jsonl").write_text(json.dumps({"x": "other"}))
    for text in ("one", "two", "three"):
        (tmp_path / name).write_text(json.dumps({"x": text}))
        os.utime(name, (1, 1))
        assert common.load_rows(name)["x"][:] == [text]


def test_max_length_fits_the_model(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    for positions, expected in ((16, 16), (10**6, 2048)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
        assert common.default_max_length(tmp_path) == expected


def test_gold_by_hand():
    for response, value in {"apple pear plum": 3, "apple pear": 2, "apple pear plum fig": 2, "": 0, "saw": -1,
                            "apple apple plum": 1, "apple dog plum": 1}.items():
        assert toy.gold("\n\nHuman: name three fruits\n\nAssistant:", response) == value, response
    assert toy.gold("\n\nHuman: name two fruits and tools\n\nAssistant:", " apple saw") == 2


def test_toy_files():
    """make.py makes the comparisons; model and samples depend on the processor, but the model has to have learned."""
    texts = {path.stem: path.read_text() for path in (ROOT / "docs/toy").glob("*.jsonl")}
    for split in ("train", "noisy", "id", "ood", "shifted"):
        assert "".join(json.dumps(row) + "\n" for row in toy.make_comparisons(split)) == texts[split], split
    rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in texts.items()}
    assert all(voted[key] == row[key] for voted, row in zip(rows["voted"], rows["train"], strict=True) for key in row)
    assert [row["prompt"] for row in rows["meta"]] == [row["prompt"] for row in rows["train"][:1000]]

    model = AutoModelForCausalLM.from_pretrained(ROOT / "docs/toy/model")
    args = toy.make_tokenizer(), [row["prompt"] for row in rows["id"][:50]], 4
    samples = {"meta": rows["meta"], "model": toy.sample(model, *args),
               "random": toy.sample(LlamaForCausalLM(model.config), *args)}
    gold = {name: np.mean([toy.gold(row["prompt"], x) for row in part for x in row["responses"]])
            for name, part in samples.items()}
    assert gold["random"] < -5 and 0.5 < min(gold["meta"], gold["model"]), gold
