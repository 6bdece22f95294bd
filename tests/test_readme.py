"""What the README names exists, and the scripts are what it says of them."""

import ast
import collections
import re
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
    known = set.union(*map(flags, SCRIPTS)) | {"--help", "--nproc_per_node", "--plot"}
    for path in (ROOT / "tests").glob("bench_*.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', path.read_text()))
    assert set(re.findall(r"--[a-z_]+(?:-[a-z]+)*", README)) <= known
    for name in re.findall(r"`([\w/]+\.(?:py|txt|md))`", README):
        assert (ROOT / name).is_file(), name


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
