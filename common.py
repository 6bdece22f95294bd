"""What all scripts share: data, the batch, the reward model, checkpoints and the run folder.

One data structure serves every method: a prompt with k responses (a comparison has k = 2). The
prompt is computed once:

    input_ids       prompt | response 1 | response 2 | padding
    segments        0 0 0    1 1          2 2 2        -1 -1
    position_ids    0 1 2    3 4          3 4 5         0  0

A token attends to the earlier tokens of the prompt and of its own response, and has the position
that it would have if its response stood there alone.

To follow baseline_rm.py, read `encode`, `Batch` and `RewardModel.forward`. The rest is plumbing, in
this order: processes and flags, data, batch, model, checkpoints, run folder.
"""

import argparse
import atexit
import collections
import datetime
import functools
import gc
import glob
import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from datasets.fingerprint import Hasher
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict)
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
TOY = Path(__file__).resolve().parent / "docs/toy"
TOY_DATA = {  # the defaults of these flags when --model is not given
    "model": f"{TOY}/model",
    "data": f"{TOY}/train.jsonl",
    "eval_data": [(name, f"{TOY}/{name}.jsonl") for name in ("id", "ood", "shifted", "noisy")],
}


# ------------------------------------------------------------------------------ processes and flags

def fatal(message):
    """End the run with one line on stderr and exit code 1."""
    raise SystemExit(f"error: {' '.join(str(message).split())}")


def print_error(kind, error, traceback):
    """The sys.excepthook of a run: the last line on stderr says what went wrong.

    Problems with files raise OSError. Anything else may be a bug: its traceback stays."""
    if not issubclass(kind, OSError):
        sys.__excepthook__(kind, error, traceback)
    print(f"error: {kind.__name__}: {' '.join(str(error).split())}", file=sys.stderr)


def print0(text):
    """Print a line on rank 0, above the progress bar."""
    if RANK == 0:
        tqdm.write(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with the docstring as it stands and the default of every flag."""


def in_range(kind, low, high=math.inf):
    """An argparse type: an int or float from `low` to `high`."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)

    # argparse then says: invalid float from 0 to 1 value: '2'
    parse.__name__ = f"{kind.__name__} from {low:g} to {high:g}"
    return parse


def named_source(text):
    """An argparse type: NAME=SOURCE -> (name, source). The name may become that of a file."""
    name, source = text.split("=", 1)
    if "/" in name:
        raise ValueError
    return name, source


named_source.__name__ = "NAME=SOURCE"  # argparse then says: invalid NAME=SOURCE value


def is_toy(model):
    """Whether --model, a folder, a hub id or None, stands for the toy world's model."""
    return model is None or Path(model).resolve() == TOY / "model"


def setup():
    """Join the processes that torchrun started, or be the only one; -> the device of this rank."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without "±" must not end a run

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", rank=RANK, world_size=WORLD_SIZE,
            store=None if "RANK" in os.environ else dist.HashStore(),
            # ranks wait while the first one tokenises or asks a judge, which can take hours
            timeout=datetime.timedelta(days=7))
        # atexit runs the last one first. Then gloo's threads still need Python: pytorch #190489
        atexit.register(time.sleep, 0.5 if WORLD_SIZE > 1 else 0)
        atexit.register(dist.destroy_process_group)
    sys.excepthook = print_error  # here, because init_process_group sets one, too

    # what datasets logs as an error, it raises as well
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    transformers.utils.logging.set_verbosity_error()
    if RANK > 0 or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    return torch.device(f"cuda:{LOCAL_RANK}" if cuda else "cpu")


# --------------------------------------------------------------------------------------------- data

def load_rows(source, split="train"):
    """Raw rows of a .jsonl, .json (also .gz) or .parquet file, or of a hub id[[:config]:split].

    Stops with an error that names the source if it cannot be read or has no rows."""
    file_type = re.search(r"\.(json|parquet)l?(\.gz)?$", source)
    try:
        if file_type:
            # datasets caches by time stamp; with this `name` it caches by content
            content = Hasher.hash(Path(source).read_bytes())
            rows = datasets.load_dataset(
                file_type[1], name=content, data_files=glob.escape(source), split="train")
        else:
            # id, id:split or id:config:split, but not the colon in train[:100]
            path, *parts = re.split(r":(?![^[]*\])", source)
            *config, split = parts or [split]
            rows = datasets.load_dataset(path, *config, split=split)
    except Exception as error:
        fatal(f"{source}: {error.__cause__ or error!r}")
    if len(rows) == 0:
        fatal(f"{source}: no rows")
    return rows


def transcript(turns):
    """Turns, the last one the assistant's -> '\\n\\nHuman: ...\\n\\nAssistant: ...'"""
    text = ""
    for i, turn in enumerate(turns):
        speaker = "Assistant" if (len(turns) - i) % 2 else "Human"
        text += "\n\n" + speaker + ": " + turn
    return text


def turn_keys(messages):
    """What two equal messages have in common. Other keys, and null values, do not count."""
    keys = []
    for x in messages:
        content = str(x.get("content") or "").strip()
        keys.append((x["role"], content, x.get("tool_calls") or []))
    return keys


def join_messages(prompt, messages):
    """Two lists of messages -> one conversation, without repeating turns that are in both."""
    known = turn_keys(prompt)
    turns = turn_keys(messages)
    is_whole = turns[0][0] != "assistant"  # a conversation does not begin with an answer
    for start in range(len(turns)):
        if is_whole and turns[start : start + len(known)] == known:  # the whole prompt is in it
            return messages
    n = 0  # or the messages repeat the prompt from turn n on: nothing of it, if n is its length
    while turns[: len(known) - n] != known[n:]:
        n += 1
    if is_whole and n == len(known) and known[-1][0] == "user":
        raise ValueError("the prompt is not part of the conversation in 'chosen' or 'rejected'")
    return prompt[:n] + messages


def read_conversations(prompt, chosen, rejected):
    """A prompt, text or messages, and two lists of messages -> what `read_row` returns."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt.strip() else []
    chosen = join_messages(prompt, chosen)
    rejected = join_messages(prompt, rejected)
    for messages in (chosen, rejected):
        if messages[-1]["role"] != "assistant":
            raise ValueError("'chosen' or 'rejected' does not end with a message of the assistant")
    same = turn_keys(chosen[:-1]) == turn_keys(rejected[:-1])
    return chosen[:-1] if same else None, [chosen[-1:], rejected[-1:]]


def read_texts(prompt, chosen, rejected):
    """A prompt, which may be empty, and two texts -> what `read_row` returns."""
    # Do both repeat the prompt? This is a guess: "Hello! How are you?" does not repeat "Hello".
    start = prompt.strip()
    end = r"(?!\S)" if start[-1:].isalnum() else ""
    repeats = [re.match(re.escape(start) + end, text.lstrip()) for text in (chosen, rejected)]
    if start and all(repeats):
        return prompt.rstrip(), [x.string[x.end():] for x in repeats]
    if prompt:
        return prompt, [chosen, rejected]

    # transcripts, as in hh-rlhf: the prompt ends with the last "Assistant:"
    chosen_prompt, mark, chosen = chosen.rpartition("\n\nAssistant:")
    rejected_prompt, other_mark, rejected = rejected.rpartition("\n\nAssistant:")
    if not mark or not other_mark:
        raise ValueError("no 'prompt', and 'chosen' or 'rejected' has no '\\n\\nAssistant:' turn")
    return chosen_prompt + mark if chosen_prompt == rejected_prompt else None, [chosen, rejected]


def read_row(row):
    """A raw row in any known form -> prompt and responses, all texts or all lists of messages.

    The prompt is None if chosen and rejected answer different ones. Null values become "".
    Raises ValueError if the row has no known form."""
    prompt = row.get("prompt") or ""
    try:
        if row.get("chosen") is None and isinstance(row.get("responses"), list):
            return prompt, row["responses"]
        chosen, rejected = row["chosen"], row["rejected"]
        if not chosen or not rejected:
            return prompt, ["", ""]
        is_text = isinstance(chosen, str)
        # neither a prompt nor a transcript: `encode_row` drops and counts it
        if "prompt" in row and not prompt and is_text and "\n\nAssistant:" not in chosen:
            return "", [chosen, rejected]
        if isinstance(chosen[0], dict):
            return read_conversations(prompt, chosen, rejected)
        if isinstance(chosen, list) and not prompt:  # the authors' release
            return read_texts(prompt, transcript(chosen), transcript(rejected))
        return read_texts(prompt, chosen, rejected)
    except (AttributeError, IndexError, KeyError, TypeError):
        columns = ", ".join(row)
        raise ValueError(f"no known form (columns: {columns})") from None


def render(messages, tokenizer, **kwargs):
    """Messages -> text, by the tokenizer's chat template; kwargs are those of apply_chat_template.

    Llama 3's template writes today's date. It is pinned, or scores would change every day. Raises
    ValueError if the template would write a message otherwise than it is meant."""
    pinned_date = "{% macro strftime_now(format) %}01 Jan 2024{% endmacro %}"
    template = pinned_date + tokenizer.get_chat_template()
    for message in messages:
        if not isinstance(message.get("content") or "", str):
            raise ValueError("the content of a message is not a text")
        if message.get("tool_calls") and "tool_calls" not in template:
            raise ValueError("the chat template does not write tool calls")
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, **kwargs)


@functools.cache
def start_ids(tokenizer):
    """The ids that the tokenizer begins a text with, such as BOS."""
    ids = tokenizer("a").input_ids
    first = tokenizer("a", add_special_tokens=False).input_ids[0]
    return ids[: ids.index(first)]


def to_ids(text, tokenizer, is_chat):
    """A text -> token ids. An EOS that the tokenizer adds is left out.

    A chat template has written its own BOS. Other texts get it, unless they bring their own."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    start = start_ids(tokenizer)
    if is_chat or ids[: len(start)] == start:
        return ids
    return start + ids


def without_padding(ids, tokenizer):
    """Token ids without padding at the end, which transformers' classifiers ignore."""
    while ids and ids[-1] == tokenizer.pad_token_id:
        ids = ids[:-1]
    return ids


def common_prefix_length(rows):
    """How many token ids are the same at the beginning of all rows."""
    length = 0
    for tokens in zip(*rows):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def end_ids(tokenizer, is_chat):
    """The ids after the words of a response: EOS or, in conversations, the end of the template."""
    if not is_chat:
        return without_padding([tokenizer.eos_token_id], tokenizer)
    backwards = []
    for word in ("apple", "dog"):  # what two conversations with different answers end in
        messages = [{"role": "user", "content": "name"}, {"role": "assistant", "content": word}]
        ids = to_ids(render(messages, tokenizer), tokenizer, is_chat)
        backwards.append(without_padding(ids, tokenizer)[::-1])
    return backwards[0][: common_prefix_length(backwards)][::-1]


def encode(prompt, responses, tokenizer, max_length):
    """A prompt and k responses, texts or lists of messages -> prompt_ids, k lists of response_ids,
    and whether the prompt is truncated.

    A text ends in one EOS, and a conversation as its chat template ends it. The reward is read at
    the last of these tokens. The prompt is the common prefix of the k full texts, so first words
    that all responses share belong to it. If one of the texts is longer than `max_length`, the
    prompt loses its oldest tokens, but not BOS. If only BOS would be left, the prompt is []."""
    is_chat = isinstance(prompt, list)
    rows = []
    for response in responses:
        if is_chat:
            ids = to_ids(render(prompt + response, tokenizer), tokenizer, is_chat)
        else:
            # the text may already end in one EOS or more
            text = re.sub(rf"({re.escape(tokenizer.eos_token)}\s*)+$", "", prompt + response)
            ids = to_ids(text, tokenizer, is_chat) + [tokenizer.eos_token_id]
        rows.append(without_padding(ids, tokenizer))

    lengths = [len(ids) for ids in rows]
    # the prompt's length; a response that is the beginning of another keeps its last token
    length = min(common_prefix_length(rows), min(lengths) - 1)
    start = 1 if rows[0][0] == tokenizer.bos_token_id else 0
    # UNSTATED: the paper is silent about long rows. The authors' code skips a row if its last turn
    # alone is too long.
    surplus = max(0, max(lengths) - max_length)
    rest = rows[0][start + surplus : length]
    prompt_ids = (rows[0][:start] + rest) if rest else []
    return prompt_ids, [ids[length:] for ids in rows], surplus > 0


def encode_row(row, number, tokenizer, max_length, code):
    """A raw row -> the columns of `tokenize`, and `problem`: why the row cannot be used, or "".

    `code` is not used here. It is an argument because `datasets` caches by the arguments."""
    prompt_ids = [0]  # of a row that is dropped; `datasets` finds no type for an empty list
    response_ids = [[0]]
    truncated = False
    problem = ""
    try:
        prompt, responses = read_row(row)
        contents = []
        for response in responses:
            text = response
            if isinstance(response, list):
                text = response[-1].get("content") or response[-1].get("tool_calls")
            contents.append(str(text or "").strip())
        if prompt is None:
            problem = "with different prompts"
        elif not prompt or not all(contents) or not contents:
            problem = "empty"
        elif len(contents) == 1:
            problem = "with one response"
        else:
            prompt_ids, response_ids, truncated = encode(prompt, responses, tokenizer, max_length)
            if all(ids == response_ids[0] for ids in response_ids):
                problem = "with equal responses"
            elif not prompt_ids:
                problem = "without room for the prompt"
                prompt_ids = [0]
    except Exception as error:  # a chat template may raise anything
        raise ValueError(f"row {number + 1}: {error} (forms of rows: see the README)") from None
    length = len(prompt_ids) + sum(len(ids) for ids in response_ids)
    return {"prompt_ids": prompt_ids, "response_ids": response_ids, "k": len(response_ids),
            "length": length, "row": number, "truncated": truncated, "problem": problem}


def tokenize(rows, source, tokenizer, max_length, k=2):
    """Raw rows -> data set with prompt_ids, response_ids, k, length (tokens, the prompt once), row
    (number of the raw row), truncated, and the raw columns that were not read.

    Rows that cannot be used are dropped and counted. Stops with an error if a row has no known
    form, if no row can be used, or if not all have k responses (None: equally many)."""
    if k and "responses" in rows.column_names and "chosen" not in rows.column_names:
        fatal(f"{source}: `responses` alone say nothing about preferences")

    for name in {"system", "images", "tools", "chat_template_kwargs"} & set(rows.column_names):
        print0(f"{source}: the column {name} is not read")

    # datasets caches by the arguments, and would not notice a change in this file's functions
    code = Path(__file__).read_text()
    arguments = {"tokenizer": tokenizer, "max_length": max_length, "code": code}
    used = {"prompt", "chosen", "rejected", "responses"}

    # the first rank of a machine fills the cache for the others
    if LOCAL_RANK > 0:
        dist.barrier()
    try:
        data = rows.map(
            encode_row, with_indices=True, fn_kwargs=arguments, desc=f"tokenising {source}",
            num_proc=os.cpu_count() if len(rows) > 20_000 else None,
            remove_columns=[name for name in rows.column_names if name in used])
    except ValueError as error:
        fatal(f"{source}: {error}")
    if LOCAL_RANK == 0:
        dist.barrier()

    # drop what cannot be used, and say why
    problems = np.array(data["problem"][:])
    counts = [f"{n:,} {problem}" for problem, n in collections.Counter(problems).items() if problem]
    dropped = f", dropped: {', '.join(counts)}" if counts else ""
    data = data.select(np.flatnonzero(problems == ""))
    print0(f"{source}: {len(data):,} of {len(rows):,} rows{dropped}; "
           f"{sum(data['truncated'][:]):,} prompts truncated to fit {max_length} tokens")
    if len(data) == 0:
        fatal(f"{source}: no row can be used: {', '.join(counts)}")

    sizes = sorted(set(data["k"][:]))
    if len(sizes) > 1 or k and sizes != [k]:
        fatal(f"{source}: rows have {sizes} responses, but must have {k or 'equally many'}")
    prompts = np.concatenate(data[:100]["prompt_ids"])
    if np.mean(prompts == tokenizer.unk_token_id) > 0.5:
        fatal(f"{source}: the tokenizer knows few of the words: choose a --model for such text")
    print_example(data, tokenizer)
    return data


@functools.cache
def print_once(text):
    """Print a line on rank 0, unless it has been printed before."""
    print0(text)


def print_example(data, tokenizer):
    """Print the first text as the model reads it, so that a wrong form or template is seen."""
    text = tokenizer.decode(data[0]["prompt_ids"] + data[0]["response_ids"][0])
    if len(text) > 800:
        text = f"{text[:400]} ... {text[-400:]}"
    print_once(f"first example: {text!r}")


def load_sets(pairs, tokenizer, max_length):
    """(name, source) pairs -> {name: tokenised data set}."""
    return {name: tokenize(load_rows(source, "test"), source, tokenizer, max_length)
            for name, source in pairs}


def load_tokenizer(name):
    """The tokenizer of a folder or hub id.

    The pad token of a language model must not be EOS, which would hide the end of a response. That
    of a reward model is the one in its config, by which transformers finds the token to read. It
    may be EOS, as in TRL if the language model had none: `encode` then leaves EOS out."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        config = AutoConfig.from_pretrained(name)
    except Exception as error:
        fatal(f"no model with a tokenizer in {name}: {error!r}")
    if tokenizer.eos_token is None:
        fatal(f"the tokenizer of {name} has no EOS token, and every response must end in one")

    # The first call resets padding that is set in the tokenizer's file. Do it now, because the keys
    # of the cache depend on it.
    tokenizer("a")
    pad = config.get_text_config().pad_token_id
    is_reward_model = "SequenceClassification" in str(config.architectures)
    if is_reward_model and pad in tokenizer.get_vocab().values():
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    elif tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def num_positions(config):
    """How many tokens a model can read, by its config; infinity if it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def default_max_length(name):
    """--max-length if it is not given: as many tokens as the model can read, at most 2048."""
    return min(2048, num_positions(AutoConfig.from_pretrained(name)))


# -------------------------------------------------------------------------------------------- batch

class Batch(NamedTuple):
    """B prompts with k responses each, in R = B rows of T tokens, or in R = B k separate rows."""
    index: np.ndarray           # (B,) positions in the data set; empty on a rank without rows
    input_ids: torch.Tensor     # (R, T)
    segments: torch.Tensor      # (R, T) 0 for the prompt, j for response j, -1 for padding
    position_ids: torch.Tensor  # (R, T)
    row: torch.Tensor           # (B, k) the row of each response
    last: torch.Tensor          # (B, k) and the column of its last token


def pad_rows(rows, value, device):
    """Lists of different lengths -> tensor (R, T).

    T is a multiple of 8, or SDPA would copy the mask in every layer."""
    width = 8 * math.ceil(max(len(row) for row in rows) / 8)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)


def collate(data, index, device, share):
    """Rows `index` of a tokenised data set -> Batch. `share`: responses to a prompt share a row."""
    # a rank without rows computes row 0, because FSDP's ranks must do the same, and then drops it
    examples = data[index if len(index) else [0]]

    input_ids = []
    segments = []
    position_ids = []
    ends = []  # (row, column) of the last token of each response
    for prompt, responses in zip(examples["prompt_ids"], examples["response_ids"]):
        n = len(prompt)
        for j, response in enumerate(responses, 1):
            if j == 1 or not share:  # a new row begins with the prompt
                input_ids.append(list(prompt))
                segments.append([0] * n)
                position_ids.append(list(range(n)))
            input_ids[-1] += response
            segments[-1] += [j] * len(response)
            position_ids[-1] += range(n, n + len(response))
            ends.append((len(input_ids) - 1, len(input_ids[-1]) - 1))

    k = len(examples["response_ids"][0])
    ends = torch.tensor(ends, device=device).view(-1, k, 2)[: len(index)]
    row, last = ends.unbind(-1)
    return Batch(
        np.asarray(index, int), pad_rows(input_ids, 0, device), pad_rows(segments, -1, device),
        pad_rows(position_ids, 0, device), row, last)


def tree_mask(segments, dtype):
    """Segments (R, T) -> mask (R, 1, T, T): 0 where a token attends, else -inf."""
    query = segments[:, :, None]
    key = segments[:, None, :]
    allowed = ((key == 0) | (key == query)).tril()
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -torch.inf)[:, None]


def batch_indices(n, batch_size, seed, step):
    """Row numbers of an optimizer step (batch_size,), equal on all ranks.

    They are the next ones in the permutation of the epoch; an epoch's last step may have fewer."""
    epoch, i = divmod(step, math.ceil(n / batch_size))
    permutation = np.random.default_rng((seed, epoch)).permutation(n)
    return permutation[i * batch_size : (i + 1) * batch_size]


def micro_batches(data, index, micro_tokens, model):
    """Yield this rank's rows of `index` as Batches of at most `micro_tokens` tokens, or of one row.

    The longest rows come first. All ranks get equally many batches, because FSDP's ranks must do
    the same. Rows join a batch while their padding costs less than the overhead of one more forward
    pass. Each rank gets 1 / WORLD_SIZE of the rows and of the padding."""
    overhead = micro_tokens / 8  # in tokens: by default 1,024, as measured on two CPU cores
    lengths = np.array(data["length"][index])
    lengths = 8 * np.ceil(lengths / 8)  # as `pad_rows` does
    if not model.share:  # an upper bound: k rows, none longer than the shared one
        lengths *= len(data[0]["response_ids"])
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        longest = lengths[order[0]]
        rows_that_fit = int(micro_tokens // longest)  # on each rank
        padding = np.cumsum(longest - lengths[order])  # of all ranks, if the batch ended here
        rows_worth_it = math.ceil(np.sum(padding <= WORLD_SIZE * overhead) / WORLD_SIZE)
        count = WORLD_SIZE * max(1, min(rows_that_fit, rows_worth_it))
        yield collate(data, index[order[:count][RANK::WORLD_SIZE]], model.device, model.share)
        order = order[count:]


# -------------------------------------------------------------------------------------------- model

class RewardModel(torch.nn.Module):
    """A Hugging Face sequence classifier with one label, read at the last token of each response.

    For a plain text this is AutoModelForSequenceClassification(prompt + response + EOS).logits.
    Weights, scores and features are fp32. FSDP computes in `dtype`. `share`: whether the
    responses to a prompt share a row in the batches that it reads."""

    def __init__(self, hf_model, dtype, device):
        super().__init__()
        self.hf_model = hf_model
        self.dtype = dtype
        self.device = device
        self.share = True

    def inputs(self, batch):
        """The arguments of a transformers decoder for a batch in either layout."""
        if self.share:
            mask = tree_mask(batch.segments, self.dtype)  # (R, 1, T, T)
        else:
            mask = (batch.segments >= 0).long()  # (R, T): the model adds its own causal mask
        return {"input_ids": batch.input_ids, "attention_mask": mask,
                "position_ids": batch.position_ids, "use_cache": False}

    def forward(self, batch, at=None, with_features=False):
        """Batch -> rewards (B, k); with_features: also the head's inputs (B, k, hidden).

        `at`: index tensors (row, column) of any shape, to read there and not at the last tokens."""
        if at is None:
            at = (batch.row, batch.last)
        hidden = self.hf_model.base_model(**self.inputs(batch)).last_hidden_state  # (R, T, hidden)
        features = hidden[at].float()
        rewards = self.hf_model.score(features).sum(-1)  # one label; squeeze would return a view
        return (rewards, features) if with_features else rewards


def load_pretrained(auto_class, name, flag, dropout=0.0, **changes):
    """A folder or hub id -> fp32 model, and the set of weights its files lack.

    All rates of dropout in its config, in Llama that of the attention weights, become `dropout`."""
    try:
        config = AutoConfig.from_pretrained(name, **changes)
        for part in (config, config.get_text_config()):
            for key, value in part.to_dict().items():
                if "drop" in key and isinstance(value, (int, float)):
                    # LayerDrop, which skips whole layers, stays off
                    setattr(part, key, 0.0 if "layerdrop" in key else dropout)
        model, info = auto_class.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        fatal(f"{flag} {name}: {error!r}")
    return model, set(info["missing_keys"])


def load_reward_model(name, tokenizer, device, args, flag="--model", dropout=0.0):
    """A RewardModel from a folder or hub id: a reward model or, for --model, a language model.

    A language model gets a head, seeded by args.seed. Stops with an error at anything but a decoder
    with a linear `score` head of one label."""
    gc.collect()  # reference cycles in FSDP keep a deleted model alive
    torch.manual_seed(args.seed)
    model, missing = load_pretrained(
        AutoModelForSequenceClassification, name, flag, dropout, num_labels=1)
    head = getattr(model, "score", None)
    if model.config.is_encoder_decoder or not isinstance(head, torch.nn.Linear):
        fatal(f"{flag} {name}: {type(model).__name__} is not a decoder with a linear `score` head")
    if missing and (flag != "--model" or missing != {"score.weight"}):
        fatal(f"{flag} {name} is not a reward model: its files lack {', '.join(sorted(missing))}")

    if missing:  # UNSTATED: the paper gives no init of the head; this is the usual one
        print_once(f"{flag} {name} has no `score` head: it gets a new one")
        torch.nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return prepare(RewardModel(model, getattr(torch, args.dtype), device), args)


def decoder_layers(model):
    """The decoder layers of a RewardModel or Policy: its first list of `num_hidden_layers`."""
    count = model.hf_model.config.get_text_config().num_hidden_layers
    for module in model.hf_model.get_decoder().modules():  # of text, without a vision tower
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model.hf_model).__name__} has no list of {count} decoder layers")


def prepare(model, args):
    """Get a RewardModel or Policy ready for training. -> the model

    Several ranks, bf16 and --offload need FSDP2, which also casts to args.dtype. Stops with an
    error if the model has too few positions."""
    positions = num_positions(model.hf_model.config)
    if args.max_length > positions:
        name = model.hf_model.name_or_path
        fatal(f"--max-length {args.max_length}: {name} has {positions} positions")
    if args.gradient_checkpointing:
        model.hf_model.activation_checkpointing_enable({"use_reentrant": False})
    if WORLD_SIZE > 1 or model.dtype != torch.float32 or args.offload:
        shard(model, args.offload)
    if not args.offload:  # with it FSDP keeps weights on the host, and buffers on the device
        model.to(model.device)
    model.share = can_share_prompts(model, args.max_length)
    if not model.share:
        print0("this model cannot share prompts: each response gets its own row, which is slower")
    return model.train()


def shard(model, offload):
    """Apply FSDP2 to every decoder layer, to the head, which stays in fp32, and to the rest."""
    mixed = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32)
    policies = {layer: mixed for layer in decoder_layers(model)}
    if hasattr(model.hf_model, "score"):
        policies[model.hf_model.score] = MixedPrecisionPolicy()
    policies[model] = mixed

    kwargs = {}
    if offload:
        kwargs["offload_policy"] = CPUOffloadPolicy(pin_memory=model.device.type == "cuda")
    for module, policy in policies.items():
        fully_shard(module, mp_policy=policy, reshard_after_forward=True, **kwargs)
        if WORLD_SIZE > 1:  # sum the gradients: losses are divided by the global count already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def can_share_prompts(model, max_length):
    """Whether every response in a shared row gets the features that it has in a row of its own.

    Tried on a prompt of one token, long responses that fill at least 512 columns, and after them
    two short ones. Recurrent layers and ALiBi fail, and so do windows that count columns or hold
    fewer than `max_length` tokens. In bf16 only much shorter windows are noticed. An error in
    separate rows is raised."""
    vocab_size = model.hf_model.config.get_text_config().vocab_size
    random = np.random.default_rng(0)
    length = max(1, max_length - 1)
    prompt = random.integers(vocab_size, size=1)
    long, other_long = random.integers(vocab_size, size=(2, 1 + 512 // length, length))
    short = [random.integers(vocab_size, size=n) for n in (min(2, length), 1)]

    def features_of(responses, share):
        """-> features (k, hidden) of the responses after the prompt."""
        columns = {"prompt_ids": [prompt], "response_ids": [responses]}
        model.share = share
        batch = collate(datasets.Dataset.from_dict(columns), [0], model.device, share)
        return model(batch, with_features=True)[1][0]

    def relative_error(a, b):
        """The largest relative difference between the features (k, hidden) of a response."""
        return ((a - b).norm(dim=-1) / b.norm(dim=-1)).max()

    # apart, because a batch of rows is as wide as the longest
    separate = torch.cat([features_of(long, share=False), features_of(short, share=False)])
    try:
        shared = features_of([*long, *short], share=True)
        changed = features_of([*other_long, *short], share=True)
    except Exception as exception:
        print0(f"shared prompts fail: {exception!r}")
        if isinstance(model, FSDPModule):
            model.reset_iter_state()  # or some weights would stay gathered
        return False

    # The two layouts round differently, by 1e-6, in bf16 by 0.1. A wrong one differs by about 1.
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.2
    same = relative_error(shared, separate) < tolerance
    # Other long responses must change nothing: there is no rounding here, so weak leaks show too.
    leak = relative_error(changed[-2:], shared[-2:]) > 1e-4
    return bool(same and not leak)


def clip_gradients(model, max_norm):
    """Scale the gradients to a norm of at most `max_norm` (0: any); -> the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


@torch.no_grad()
def compute_rewards(model, data, micro_tokens, with_features=False):
    """Rewards of all rows (N, k), equal on all ranks; with_features: also (N, k, hidden)."""
    rewards = torch.zeros(len(data), len(data[0]["response_ids"]))
    features = torch.zeros(*rewards.shape, model.hf_model.score.in_features if with_features else 0)
    batches = micro_batches(data, np.arange(len(data)), micro_tokens, model)
    model.eval()
    # disable=None: no bar without a terminal
    for batch in tqdm(batches, "scoring", leave=False, disable=RANK > 0 or None):
        batch_rewards, batch_features = model(batch, with_features=True)
        rewards[batch.index] = batch_rewards.cpu()
        if with_features:
            features[batch.index] = batch_features.cpu()
    model.train()
    # every rank has filled in its own rows
    dist.all_reduce(rewards)
    dist.all_reduce(features)
    if not rewards.isfinite().all():
        fatal("some rewards are not finite: try --dtype float32, or another model")
    return (rewards, features) if with_features else rewards


# -------------------------------------------------------------------------------------- checkpoints

def atomic_write(path, text):
    """Write a file under a temporary name, then rename it: a kill leaves the old or the new one."""
    tmp = Path(f"{path}.{os.getpid()}.tmp")
    tmp.write_text(text)
    tmp.replace(path)


def run_state(model, optimizer):
    """{"model": ..., "optimizer": ...}, tensors by name: a rank's own shards; tied weights once."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {"model": {name: x for name, x in weights.items() if name in names},
            "optimizer": {name: x for name, x in moments.items() if torch.is_tensor(x)}}


def save_checkpoint(folder, model, optimizer, step):
    """Write <folder>/checkpoint-<step>, then remove older ones.

    Data order and randomness are functions of seed and step, so they are not saved."""
    tmp = Path(folder, "checkpoint.tmp")
    older = list(Path(folder).glob("checkpoint-*"))
    if RANK == 0:
        shutil.rmtree(tmp, ignore_errors=True)
    dist.barrier()
    writer = dcp.HuggingFaceStorageWriter(tmp, save_distributed=True)  # in safetensors
    dcp.save(run_state(model, optimizer), storage_writer=writer)
    if RANK == 0:
        tmp.rename(Path(folder, f"checkpoint-{step}"))
        for path in older:
            shutil.rmtree(path)


def load_checkpoint(folder, model, optimizer, step):
    """Load <folder>/checkpoint-<step> in place; any number of ranks may have written it."""
    state = run_state(model, optimizer)
    reader = dcp.HuggingFaceStorageReader(Path(folder, f"checkpoint-{step}"))
    saved = reader.read_metadata().state_dict_metadata
    # a weight that never had a gradient has no moments
    state["optimizer"] = {
        name: x for name, x in state["optimizer"].items() if f"optimizer.{name}" in saved}
    dcp.load(state, storage_reader=reader)


def save_model(folder, model, tokenizer):
    """Write the Hugging Face folder of a RewardModel or Policy. Plain transformers loads it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model.hf_model, options=options)  # all ranks gather them
    if RANK == 0:
        model.hf_model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
    print0(f"saved {folder}")
    dist.barrier()


# --------------------------------------------------------------------------------------- run folder

def file_stamps(paths):
    """{file: [size, time]} for files and for the files in folders; a hub id has none."""
    stamps = {}
    for path in filter(None, paths):
        for file in (Path(path), *Path(path).glob("*")):
            if file.is_file():
                stamps[str(file)] = [file.stat().st_size, file.stat().st_mtime]
    return stamps


def check_resume(folder, old, new, may_change):
    """Stop with an error if a flag or an input file is not what it was when the run began."""
    may_change = {"resume", "output_dir", "micro_batch_tokens", "save_every",
                  "gradient_checkpointing", "offload", *may_change}
    for name in old.keys() - may_change:
        if old[name] != new.get(name):
            fatal(f"--resume: {name} was {old[name]} when {folder} began, and is {new.get(name)}")


def last_checkpoint(folder):
    """The step of the newest <folder>/checkpoint-<step>, or 0."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


def rename_run(folder):
    """Give an earlier run's folder the first free name of <folder>.1, <folder>.2 and so on."""
    i = 1
    while Path(f"{folder}.{i}").exists():
        i += 1
    folder.rename(f"{folder}.{i}")
    print0(f"{folder} held an earlier run, which is now {folder}.{i}")


def cut_log(path, step):
    """Keep the records of a metrics.jsonl up to `step`, which the run goes on from (0: none)."""
    kept = ""
    if step:
        for line in path.read_text().splitlines(keepends=True):
            is_whole = line.endswith("\n")  # a kill may leave half a line
            if is_whole and json.loads(line)["step"] <= step:
                kept += line
    atomic_write(path, kept)


def open_run(args, inputs, may_change=()):
    """Begin a run in --output-dir or, with --resume, continue the one there. -> its step, or 0.

    Without --resume an earlier run is renamed. A run is resumed only if its flags, except
    `may_change` and those in `check_resume`, and the files in `inputs` are what they were."""
    folder = Path(args.output_dir)
    args_file = folder / "args.json"
    settings = {"script": Path(sys.argv[0]).name, **vars(args), **file_stamps(inputs)}
    text = json.dumps(settings, indent=1)

    if len(dict(args.eval_data)) < len(args.eval_data):
        fatal("--eval-data: two sets have the same name")
    has_files = any(x.suffix != ".tmp" for x in folder.glob("*"))
    is_run = args_file.exists()
    if folder.is_file() or has_files and not is_run:
        fatal(f"--output-dir {folder} has files that are not from a run: choose another folder")
    inside = [x for x in inputs if x and folder.resolve() in Path(x).resolve().parents]
    if inside and not args.resume:
        fatal(f"--output-dir {folder} would be renamed, but has {inside[0]}: choose another folder")
    step = 0
    if args.resume and is_run:
        check_resume(folder, json.loads(args_file.read_text()), json.loads(text), may_change)
        step = last_checkpoint(folder)

    dist.barrier()
    if RANK == 0:
        if is_run and not args.resume:
            rename_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(args_file, text)
        cut_log(folder / "metrics.jsonl", step)
    dist.barrier()
    return step


def log(folder, step, metrics):
    """Append one record, {"step": ..., **metrics}, to <folder>/metrics.jsonl."""
    if RANK == 0:
        with open(f"{folder}/metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
