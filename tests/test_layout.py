"""
The structure of the project, read from its syntax trees: which room may import which, what an
import costs, that every flag is used, and that every command, name and diff in the docs fits.
"""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["annotate", "sft", "judge", "rl", "evaluate", "downstream_grpo"]
STAGES_IMPORTED_BY = {"rl": {"judge"}, "downstream_grpo": {"rl", "judge"}}
# what each room may import of the others; a room may always import itself
ROOMS = {
    "stable_reinforce": set(),
    "core": {"stable_reinforce"},
    "sources": {"core", "stable_reinforce"},
    "viewer": {"sources", "core", "stable_reinforce"},
    "stages": {"viewer", "sources", "core", "stable_reinforce", "toy"},
    "recipes": {"sources", "core", "stable_reinforce", *STAGES},  # nobody imports them
}
PROGRAMS = ROOT / "tests" / "programs"
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "results/README.md")
MOST_NAMES = 18  # that a stage imports from one room


def sources_of(*patterns):
    """{module name: its source} of the project's files."""
    found = {}
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[module.removesuffix(".__init__")] = path.read_text()
    return found


PROJECT = sources_of("*.py", "core/*.py", "sources/*.py", "viewer/*.py", "recipes/*.py")
TOY = sources_of("toy/*.py")


def imports(source):
    """{first part of a module's name: the names imported from it} anywhere in a source."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name.split(".")[0], set()).add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            room = "." if node.level else node.module.split(".")[0]
            found.setdefault(room, set()).update(alias.name for alias in node.names)
    return found


def room_of(module):
    room = module.split(".")[0]
    return "stages" if room in STAGES else room


# ------------------------------------------------------------------------------------------------
# Rooms and arrows


def test_the_top_level_is_the_pipeline():
    scripts = {f"{name}.py" for name in STAGES}
    allowed = scripts | {"stable_reinforce.py", "test_stable_reinforce.py"}
    assert {path.name for path in ROOT.glob("*.py")} == allowed


@pytest.mark.parametrize("module", [name for name in PROJECT if name != "test_stable_reinforce"])
def test_imports_follow_the_arrows(module):
    found = imports(PROJECT[module])
    room = room_of(module)
    project = {*ROOMS, *STAGES, "toy", "bench", "tests"}
    allowed = ROOMS[room] | STAGES_IMPORTED_BY.get(module, set())
    if room not in ("stages", "stable_reinforce"):
        allowed = allowed | {room}
    assert found.keys() & project <= allowed
    assert "." not in found


def test_the_mathematics_needs_torch_and_nothing_else():
    assert imports(PROJECT["stable_reinforce"]).keys() == {"torch", "math", "re", "typing"}


@pytest.mark.parametrize("module", STAGES)
def test_a_stage_can_be_read_without_knowing_forty_names(module):
    for room, names in imports(PROJECT[module]).items():
        if room in ("core", "sources", "viewer", "stable_reinforce", *STAGES):
            assert len(names) <= MOST_NAMES, f"{module} imports {len(names)} names from {room}"


def test_an_import_loads_none_of_the_heavy_libraries():
    """In one process, in which the first module that loads one is named."""
    recipes = [module for module in PROJECT if room_of(module) == "recipes"]
    modules = [*STAGES, "stable_reinforce", *TOY, *recipes]
    done = subprocess.run(
        [sys.executable, PROGRAMS / "import_each.py", *modules],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{module}: nothing heavy" for module in modules]


# ------------------------------------------------------------------------------------------------
# Flags


def flags(source):
    """The attribute of args in which each --flag of a source is stored."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = getattr(node.func, "attr", "") or getattr(node.func, "id", "")
        if function not in ("add_argument", "add"):
            continue
        names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        names = [name for name in names if isinstance(name, str)]
        for name in names:
            if name.startswith("--"):
                found.append(name.removeprefix("--").replace("-", "_"))
    return found


def attributes_of_args(source):
    """The names read as args.name or self.args.name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = getattr(node.value, "id", "") or getattr(node.value, "attr", "")
            if owner == "args":
                found.add(node.attr)
    return found


def test_every_flag_is_read():
    read = set()
    for source in PROJECT.values():
        read |= attributes_of_args(source)
    for module, source in PROJECT.items():
        assert set(flags(source)) <= read, module
    for module, source in TOY.items():
        assert set(flags(source)) <= attributes_of_args(source) | read, module


@pytest.mark.parametrize("module", STAGES)
def test_help_tells_every_default(module):
    parser = importlib.import_module(module).parser()
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        if action.option_strings and action.default not in (None, False, [], {}, "==SUPPRESS=="):
            default = action.default
            if isinstance(default, list):
                default = " ".join(map(str, default))
            assert f"[{default}]" in text, action.option_strings


# ------------------------------------------------------------------------------------------------
# What the docs say


def commands(text, marker):
    """(script or "make", its words) of each command line; a backslash continues a line."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = line.strip()
        if not line.startswith(marker):
            continue
        words = shlex.split(line.removeprefix(marker), comments=True)
        while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):  # VARIABLE=value command
            words = words[1:]
        if not words:
            continue
        scripts = [i for i, word in enumerate(words) if word.endswith(".py") and ":" not in word]
        if words[0] == "make":
            yield "make", [word for word in words[1:] if "=" not in word and word[0] != "-"]
        elif words[0] in ("python", "torchrun") and scripts and "pytest" not in words:
            yield words[scripts[0]], words[scripts[0] + 1 :]


def shell_blocks(markdown):
    return "\n".join(re.findall(r"```(?:sh|bash|console)\n(.*?)```", markdown, re.DOTALL))


def documented_commands():
    found = []
    for module, source in (PROJECT | TOY).items():
        text = ast.get_docstring(ast.parse(source)) or ""
        found += [(module, *command) for command in commands(text, "$ ")]
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        found += [(document, *command) for command in commands(shell_blocks(text), "")]
    return found


def test_every_documented_command_is_taken_by_its_script():
    """Each script offers parser(): the argparse parser that its main() uses."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    found = documented_commands()
    assert ("README.md", "make", ["test"]) in found
    for where, script, words in found:
        if script == "make":
            assert set(words) <= targets, f"{where}: make {' '.join(words)}"
            continue
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        try:
            module.parser().parse_args(words)
        except SystemExit as stop:
            assert stop.code == 0, f"{where}: {script} does not take {' '.join(words)}"


def test_the_examples_in_the_readme_are_true():
    done = subprocess.run(
        [sys.executable, "-m", "doctest", "README.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert (ROOT / "README.md").read_text().count(">>> ") > 5


def top_level_names(source):
    names = set()
    for node in ast.parse(source).body:
        names.add(getattr(node, "name", None))
        for target in getattr(node, "targets", []):
            names.add(getattr(target, "id", None))
    return names


def test_every_name_in_the_documents_is_there():
    """`rl.sync`, `core.voting.chances`: a module of the project and a name in it."""
    text = "".join((ROOT / document).read_text() for document in DOCUMENTS)
    found = 0
    for dotted in re.findall(r"`((?:\w+\.)+\w+)[`(]", text):
        module, _, name = dotted.rpartition(".")
        if module in PROJECT and name not in ("py", "jsonl"):
            assert name in top_level_names(PROJECT[module]), f"a document names {dotted}"
            found += 1
    assert found > 8


def test_the_diffs_in_contributing_fit_the_files():
    """A line without a + must be in the file that the sentence before the diff names."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    diffs = re.findall(r"([^\n]*`[\w/]+\.py`[^\n]*)\n\n```diff\n(.*?)```", text, re.DOTALL)
    assert len(diffs) == text.count("```diff")
    for sentence, diff in diffs:
        file = re.search(r"`([\w/]+\.py)`", sentence)[1]
        lines = (ROOT / file).read_text().splitlines()
        for line in diff.splitlines():
            if not line.startswith("+"):
                assert line[1:] in lines, f"{sentence}: {file} has no line {line[1:]!r}"


def test_every_test_that_contributing_names_is_there():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(names) > 2
    for name in names:
        assert f"def {name}(" in tests, name


def test_every_file_that_the_docs_link_to_is_there():
    for document in DOCUMENTS:
        folder = (ROOT / document).parent
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / document).read_text()):
            if "://" not in link:
                assert (folder / link).exists(), f"{document} links to {link}"


# ------------------------------------------------------------------------------------------------
# The checks, checked


def test_the_import_check_sees_every_kind_of_import():
    source = "import torch.nn as nn, os\ndef f():\n    from rl import sync\nfrom . import x\n"
    expected = {"torch": {"torch.nn"}, "os": {"os"}, "rl": {"sync"}, ".": {"x"}}
    assert imports(source) == expected


def test_the_flag_check_sees_a_dead_flag():
    source = "p.add_argument('--lr')\nadd('--dry-run', action='store_true')\nuse(args.lr)"
    assert flags(source) == ["lr", "dry_run"]
    assert attributes_of_args(source) == {"lr"}
    assert attributes_of_args("self.args.far, other.near") == {"far"}


def test_the_command_check_reads_commands():
    text = (
        "do:\n    $ X=1 torchrun --nproc_per_node=4 rl.py --clip 1e3 \\\n"
        "        --data 'a b'  # comment\n    $ make test\n    $ python -m pytest a.py\n"
        " rl.py --not-a-command\n    $ python toy/world.py --show\n"
    )
    expected = [
        ("rl.py", ["--clip", "1e3", "--data", "a b"]),
        ("make", ["test"]),
        ("toy/world.py", ["--show"]),
    ]
    assert list(commands(text, "$ ")) == expected
    assert shell_blocks("```sh\nmake test\n```\n```python\nno\n```\n") == "make test\n"
