"""
The architecture, held by the syntax trees: who imports whom, what an import costs, that every flag is read, that every command in
a docstring or in README.md would be taken by the script it names, and that names and diffs in README.md fit the code. Scripts are
checked from the day they exist; the checks themselves are tried on small sources with a known fault.
"""
import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIPELINE = ["stable_reinforce", "annotate", "sft", "judge", "rl", "evaluate", "downstream_grpo"]  # each imports from its left only
SCRIPTS = [name for name in PIPELINE if (ROOT / f"{name}.py").exists()]
TOY = [f"toy/{path.stem}" for path in sorted((ROOT / "toy").glob("*.py"))]
HEAVY = {"vllm", "deepspeed", "transformers", "openai", "PIL", "datasets", "qwen_vl_utils", "matplotlib", "torchvision"}
FOLDERS = ["toy", "tests", "bench"]


def imports(source):
    """Top names of all modules that a source imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else node.module.split(".")[0])
    return found


def flags(source):
    """The attribute each --flag of a source is stored in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (getattr(node.func, "attr", "") == "add_argument" or getattr(node.func, "id", "") == "add"):
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            dest = next((k.value.value for k in node.keywords if k.arg == "dest"), None)
            long = next((n for n in names if n.startswith("--")), names[0] if names else "")
            yield dest or long.lstrip("-").replace("-", "_")


def unread_flags(source, *others):
    """Flags never read as args.x (or through vars(args) by name, which does not count); others: sources of what gets args handed on."""
    nodes = [n for text in (source, *others) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute)]
    read = {n.attr for n in nodes if "args" in (getattr(n.value, "id", ""), getattr(n.value, "attr", ""))}
    return sorted(set(flags(source)) - read)


def commands(text, marker):
    """(script or "make", its words) of each command line that begins with marker; a backslash continues a line."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = line.strip()
        if marker and not line.startswith(marker):
            continue
        words = shlex.split(line[len(marker):], comments=True)
        while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):  # VARIABLE=value command
            words = words[1:]
        scripts = [i for i, w in enumerate(words) if w.endswith(".py") and "::" not in w]
        if words and words[0] == "make":
            yield "make", [w for w in words[1:] if "=" not in w and not w.startswith("-")]
        elif words and words[0] in ("python", "python3", "torchrun", "deepspeed") and scripts and "pytest" not in words:
            yield words[scripts[0]], words[scripts[0] + 1:]


def shell_blocks(markdown):
    return "\n".join(re.findall(r"```(?:sh|bash|console)\n(.*?)```", markdown, re.DOTALL))


def documented_commands():
    for name in SCRIPTS + TOY:
        for command in commands(ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text())), "$ "):
            yield (f"{name}.py", *command)
    for command in commands(shell_blocks((ROOT / "README.md").read_text()), ""):
        yield ("README.md", *command)


# ---------------------------------------------------------------------------------------------------


def test_the_top_level_is_the_pipeline():
    allowed = {f"{name}.py" for name in PIPELINE} | {"test_stable_reinforce.py"}
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    there = {p for p in tracked if "/" not in p} or {p.name for p in ROOT.glob("*.py")}  # not a git checkout: what lies there
    assert "stable_reinforce.py" in there and there <= allowed, there - allowed
    assert not [p for p in ROOT.rglob("utils.py") if ".venv" not in p.parts]


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_point_back_along_the_pipeline(name):
    found = imports((ROOT / f"{name}.py").read_text())
    siblings = found & (set(PIPELINE) | {"test_stable_reinforce", *FOLDERS, "."})
    assert siblings <= set(PIPELINE[:PIPELINE.index(name)])
    if name == "stable_reinforce":
        assert found == {"torch", "math", "re"}


@pytest.mark.parametrize("name", SCRIPTS + TOY)
def test_an_import_loads_none_of_the_heavy_libraries(name):
    code = f"import sys, {name.replace('/', '.')}; print(' '.join(sorted({HEAVY!r} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr


@pytest.mark.parametrize("name", SCRIPTS + TOY)
def test_every_flag_is_read(name):
    source = (ROOT / f"{name}.py").read_text()
    assert unread_flags(source, *((ROOT / f"{other}.py").read_text() for other in imports(source) & {*PIPELINE})) == []


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "stable_reinforce"])
def test_help_tells_every_default(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    p = importlib.import_module(name).parser()
    text = " ".join(p.format_help().split())
    defaults = [a.default for a in p._actions if a.option_strings and a.default not in (None, [], {}, "==SUPPRESS==")]
    untold = [default for default in defaults if default is not False and f"[{default}]" not in text]
    assert untold == [] and len(defaults) > 4


def test_every_documented_command_is_taken_by_its_script():
    """Each script offers parser(): the argparse parser that its main() uses."""
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = 0
    sys.path.insert(0, str(ROOT))
    try:
        for where, script, words in documented_commands():
            seen += 1
            if script == "make":
                assert set(words) <= targets, f"{where}: make {' '.join(words)}: the Makefile has {sorted(targets)}"
                continue
            assert (ROOT / script).exists(), f"{where}: {script} does not exist"
            try:
                importlib.import_module(script.removesuffix(".py").replace("/", ".")).parser().parse_args(words)
            except SystemExit as stop:
                assert stop.code == 0, f"{where}: {script} does not take: {' '.join(words)}"
    finally:
        sys.path.remove(str(ROOT))
    assert seen  # make test at least stands in the README


def test_the_examples_in_the_readme_are_true():
    done = subprocess.run([sys.executable, "-m", "doctest", "README.md"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert (ROOT / "README.md").read_text().count(">>> ") > 5


def test_every_name_in_the_readme_is_there():
    named = set(re.findall(r"`(\w+)\.([A-Za-z_]\w*)[`(]", (ROOT / "README.md").read_text()))
    named = {(module, name) for module, name in named if module in SCRIPTS and name not in ("py", "jsonl")}
    assert len(named) > 8
    for module, name in named:
        tree = ast.parse((ROOT / f"{module}.py").read_text())
        there = {getattr(node, "name", None) for node in tree.body}
        there |= {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)}
        assert name in there, f"README.md names {module}.{name}; {module}.py has none"


def test_the_diffs_in_the_readme_fit_the_files():
    text, fitted = (ROOT / "README.md").read_text(), 0
    for before, diff in re.findall(r"([^\n]*`\w+\.py`[^\n]*)\n\n```diff\n(.*?)```", text, re.S):
        source = (ROOT / re.search(r"`(\w+\.py)`", before)[1]).read_text().splitlines()
        for line in diff.splitlines():
            if line[0] != "+":
                assert line[1:] in source, f"README.md, {before}: no line {line[1:]!r} there"
                fitted += 1
    assert text.count("```diff") == 4 and fitted >= 5


# ---------------------------------------------------------------------------------------------------
# the checks, checked


def test_the_import_check_sees_every_kind_of_import():
    source = "import torch.nn as nn, os\ndef f():\n    from rl import rollout\n    import sft\nfrom . import x\n"
    assert imports(source) == {"torch", "os", "rl", "sft", "."}


def test_the_flag_check_sees_a_dead_flag():
    source = "p.add_argument('--lr')\np.add_argument('--dry-run', action='store_true')\np.add_argument('-n', '--number')\n" \
             "p.add_argument('data')\nadd('--far')\nadd('--dead')\nprint(args.lr, args.data, other.number)"
    assert sorted(flags(source)) == ["data", "dead", "dry_run", "far", "lr", "number"]
    assert unread_flags(source, "print(self.args.far)") == ["dead", "dry_run", "number"]


def test_the_command_check_reads_commands():
    text = "do:\n    $ X=1 torchrun --nproc_per_node=4 rl.py --clip 1e3 \\\n        --data 'a b'  # comment\n    $ make test\n" \
           "    $ python -m pytest a.py\n rl.py --not-a-command\n    $ python toy/world.py --show\n"
    assert list(commands(text, "$ ")) == [("rl.py", ["--clip", "1e3", "--data", "a b"]), ("make", ["test"]), ("toy/world.py", ["--show"])]
    assert shell_blocks("a\n```sh\nmake test\n```\n```python\nmake no\n```\n```bash\nls\n```") == "make test\n\nls\n"
