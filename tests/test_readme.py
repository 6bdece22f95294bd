"""What the README names exists, and the scripts are what it says of them."""

import ast
import collections
import difflib
import importlib
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.name != "common.py")
COMMANDS = [line.strip() for line in README.splitlines() if re.match(r"    (pip|python|torchrun|for) ", line)]


def flags(script):
    return set(re.findall(r'add\("(--[a-z-]+)"', script.read_text()))


def test_commands_name_scripts_and_their_flags():
    assert COMMANDS
    for command in COMMANDS:
        for name, rest in re.findall(r"(\S+\.py)([^;&|]*)", command):
            assert (ROOT / name).is_file(), command
            if (ROOT / name) in SCRIPTS:
                assert set(re.findall(r"--[a-z-]+", rest)) <= flags(ROOT / name), command


def test_flags_and_files_exist():
    known = set.union(*map(flags, SCRIPTS)) | {"--help", "--nproc_per_node", "--nnodes", "--rdzv-backend",
                                                   "--rdzv-endpoint"}
    for path in [*(ROOT / "tests").glob("bench_*.py"), *(ROOT / "tests").glob("claims_*.py")]:
        known |= set(re.findall(r'"(--[a-z-]+)"', path.read_text()))
    assert set(re.findall(r"--[a-z_]+(?:-[a-z]+)*", README)) <= known
    for name in re.findall(r"`((?!runs/)[\w/]+\.(?:py|txt|md))`|\]\((docs/\S+)\)", README):
        name = "".join(name)
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("command", sorted({
    command for command in COMMANDS + re.findall(r"\| `((?:python|torchrun) [^`]+)` \|", README)
    if re.search(r"\b(%s)\.py" % "|".join(path.stem for path in SCRIPTS), command)}))
def test_commands_parse(command, monkeypatch, tmp_path):
    """Every command of ours is one that its script takes."""
    monkeypatch.chdir(tmp_path)
    Path("runs/a/model").mkdir(parents=True)
    Path("runs/a/args.json").write_text(json.dumps({"model": "toy"}))  # what eval.py looks for without flags
    for name, rest in re.findall(r"(?<![\w/])(\w+)\.py([^;&|#]*)", command):
        monkeypatch.setattr("sys.argv", [f"{name}.py", *shlex.split(rest.split(" " * 5)[0].replace("$s", "1"))])
        importlib.import_module(name).parse_args()


def test_the_whole_paper_in_one_sitting(script, llama, monkeypatch):
    """The README's block of eight commands, one after the other, on a tiny model and little data."""
    block = re.search(r"## The whole paper.*?\n\n((?:    torchrun [^\n]*\n)+)", README, re.DOTALL).group(1)
    commands = [line.split()[1:] for line in block.splitlines()]
    assert len(commands) == 8
    monkeypatch.setattr("common.toy_model", lambda: llama)
    little = {
        "vote_strength.py": ["--members", "2"], "meta_rm.py": ["--meta-prompts", "16", "--max-new-tokens", "4"],
        "ppo_loop.py": ["--iterations", "2", "--batch-size", "4", "--max-new-tokens", "4", "--eval-prompts", "4",
                        "--eval-data", "id=toy:id,n=20", "--rm-flags",
                        "--epochs 1 --batch-size 16 --max-length 64 --meta-prompts 8 --max-new-tokens 4"],
        "eval.py": ["--eval-prompts", "4", "--max-new-tokens", "4", "--eval-data", "id=toy:id,n=20"]}
    for name, *flags in commands:
        if name == "eval.py":
            runs = sorted(Path("runs").glob("*/model"))
            policies = [f"{path.parts[1]}={path}" for path in sorted(Path("runs").glob("*/round-1/policy"))]
            flags += ["--reward-models", *runs, "--policies", *policies, "--prompts", "toy:id"]
            monkeypatch.setattr("sys.argv", [name, *map(str, flags), *little[name]])
            runpy.run_path(str(ROOT / name), run_name="__main__")
        else:
            script(name, *flags, *little.get(name, []))
    tables = {record["table"] for record in json.loads(Path("runs/eval/eval.json").read_text())}
    assert tables == {"reward models", "policies", "wins"}
    for path in ("vote_strength/strength", "contrastive_rm/features", "hacking/kl", "eval/calibration", "eval/wins"):
        assert (Path("runs") / f"{path}.png").stat().st_size > 5000


def test_the_table_of_files():
    base = (ROOT / "baseline_rm.py").read_text().splitlines()
    rows = re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \| (\d*) \| \d* \|$", README, re.MULTILINE)
    assert {name for name, _, _ in rows} == {path.name for path in ROOT.glob("*.py")}
    for name, lines, new in rows:
        text = (ROOT / name).read_text().splitlines()
        assert int(lines) == len(text), name
        if name not in ("baseline_rm.py", "common.py"):
            blocks = difflib.SequenceMatcher(None, base, text, autojunk=False).get_matching_blocks()
            assert int(new) == len(text) - sum(block.size for block in blocks), name


def test_files_can_be_read_in_one_sitting():
    most = {"baseline_rm.py": 180, "vote_strength.py": 310, "denoise_rm.py": 310, "contrastive_rm.py": 340,
            "meta_rm.py": 300, "ppo_loop.py": 560, "eval.py": 920, "common.py": 1095}
    assert {name for name, lines in most.items() if len((ROOT / name).read_text().splitlines()) > lines} == set()
    assert {*most} == {path.name for path in ROOT.glob("*.py")}


def test_equations_lead_to_code():
    places = re.findall(r"`(\w+\.py): (\w+)`", README)
    assert len(places) > 10
    for name, function in places:
        assert re.search(rf"^(def|class) {function}\b", (ROOT / name).read_text(), re.MULTILINE), (name, function)


def test_copies_are_copies():
    """A function that stands in several scripts is the same in each, but for those that are the method."""
    texts = collections.defaultdict(set)
    for path in SCRIPTS:
        text = path.read_text()
        for node in ast.parse(text).body:
            if getattr(node, "name", "evaluate") not in ("parse_args", "evaluate", "plot"):
                if (node.name, path.name) != ("preference_loss", "denoise_rm.py"):  # Eqs. 5 and 6
                    texts[node.name].add(ast.get_source_segment(text, node))
    assert [name for name, copies in texts.items() if len(copies) > 1] == []


def test_nothing_is_unpickled_and_no_remote_code_is_run():
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        keywords = {node.arg for node in nodes if isinstance(node, ast.keyword)}
        assert not names & {"pickle", "cPickle", "dill", "joblib"} and "trust_remote_code" not in keywords, path.name
        assert not calls & {"eval", "torch.load", "torch.save", "np.load", "numpy.load"}, path.name


def test_ci_runs_the_test_command():
    [command] = [command for command in COMMANDS if "pytest" in command]
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == command


def test_every_mark_has_its_row():
    def marks(text):
        return re.findall(r"# (UNSTATED|DEVIATION):", text)

    rows = collections.Counter(re.findall(r"^\| (UNSTATED|DEVIATION) \| `(\S+)` \|", README, re.MULTILINE))
    code = collections.Counter((mark, path.name) for path in ROOT.glob("*.py") for mark in marks(path.read_text()))
    assert rows == code


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "common.py"], ids=lambda path: path.name)
def test_scripts_keep_to_the_house_rules(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert max(map(len, text.splitlines())) <= 120
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            public = node in tree.body and node.name != "parse_args"
            assert not public or ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
    imports = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imports |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    ours = {Path(other).stem for other in ROOT.glob("*.py")}
    assert imports & ours <= {"common"}
    if path.name == "common.py":  # no flag, no loss
        assert "argparse" not in imports and "logsigmoid" not in text
