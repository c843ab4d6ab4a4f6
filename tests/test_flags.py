"""core/flags.py: types of flags, flags in files, errors in one line."""

import errno
import importlib
import os

import pytest

from core import flags
from core.files import InputError

STAGES = ("annotate", "sft", "rl", "judge", "evaluate", "downstream_grpo")


def parser():
    p = flags.command_line("What it does.")
    p.prog = "stage.py"
    p.add_argument("--n", type=flags.whole(1), default=3, help="how many")
    p.add_argument("--name", help="of it")
    return p


def error_of(words, capsys, parser=None):
    """What a user sees of a command line that is refused: one line, and status 2."""
    with pytest.raises(SystemExit) as stop:
        (parser or globals()["parser"]()).parse_args(words)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.endswith("\n") and printed.count("\n") == 1
    return printed.rstrip("\n")


def test_flags_can_be_in_a_file_and_defaults_are_in_the_help(tmp_path, capsys):
    (tmp_path / "inner").write_text("--n 5")
    (tmp_path / "args").write_text(f"@{tmp_path}/inner --name 'a b'  # a comment\n")
    args = parser().parse_args([f"@{tmp_path}/args"])
    assert (args.n, args.name) == (5, "a b")
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    printed = capsys.readouterr().out
    assert "how many [3]" in printed and "--name NAME  of it\n" in printed


@pytest.mark.parametrize("stage", STAGES)
def test_every_numeric_flag_of_a_stage_has_bounds(stage):
    """A bare int or float takes -1, nan and inf."""
    for action in importlib.import_module(stage).parser()._actions:
        flag = action.option_strings[-1]
        assert action.type not in (int, float), f"{flag}: give it a type of core/flags.py"
        if isinstance(action.default, (int, float)) and action.nargs != 0:
            assert action.type or isinstance(action.default, bool), f"{flag} has no type"
        if action.type and action.type.__qualname__.startswith("_within"):
            for text in ("nan", "inf", "-inf", "x", "", "-1"):
                with pytest.raises(Exception, match=r"expected a (whole )?number"):
                    action.type(text)


@pytest.mark.parametrize(
    "kind, text, message",
    [
        (flags.whole(1), "0", "expected a whole number, 1 or more, got '0'"),
        (flags.whole(), "-1", "expected a whole number, 0 or more, got '-1'"),
        (flags.whole(0, 3), "4", "expected a whole number from 0 to 3, got '4'"),
        (flags.whole(), "1.5", "expected a whole number, 0 or more, got '1.5'"),
        (flags.whole(), "9" * 5000, "expected a whole number, 0 or more, got '9999"),
        (flags.number(), "nan", "expected a number, 0 or more, got 'nan'"),
        (flags.number(), "inf", "expected a number, 0 or more, got 'inf'"),
        (flags.number(0, 1), "1.5", "expected a number from 0 to 1, got '1.5'"),
        (flags.above_zero(), "0", "expected a number above 0, got '0'"),
        (flags.above_zero(1), "2", "expected a number above 0 and at most 1, got '2'"),
        (flags.random_seed, "-1", "expected a whole number from 0 to 4294967295, got '-1'"),
        (flags.json_object, "[1]", "expected a JSON object such as"),
        (flags.json_object, "{", "expected a JSON object such as"),
        (flags.json_object, "[" * 10**5, "expected a JSON object such as"),
    ],
)
def test_a_flag_says_what_it_expects_in_one_line(capsys, kind, text, message):
    p = parser()
    p.add_argument("--flag", type=kind)
    error = error_of(["--flag", text], capsys, p)
    assert error.startswith(f"stage.py: argument --flag: {message}")
    assert error.endswith("; see --help") and len(error) <= 400


@pytest.mark.parametrize(
    "words, message",
    [
        (["--nmae", "x"], "unknown flag --nmae; perhaps --name is meant; see --help"),
        (
            ["--nam", "x"],
            "unknown flag --nam; perhaps --name is meant; see --help",
        ),  # no abbreviations
        (["--zzz=1"], "unknown flag --zzz; see --help"),
        (["x"], "unrecognized arguments: x; see --help"),
        (["--name", ""], "argument --name: expected a value, got an empty one; see --help"),
        (["--name"], "argument --name: expected one argument; see --help"),
    ],
)
def test_words_that_are_no_flags(capsys, words, message):
    assert error_of(words, capsys) == f"stage.py: {message}"


@pytest.mark.parametrize(
    "data, message",
    [
        (None, "cannot be read: No such file or directory"),
        (b"--n 5\n--name 'a", "line 2: No closing quotation; close it on this line"),
        (b"\xff\xfe", "expected a text file of flags, and this is not UTF-8"),
        (b"@preset", "@preset: the file includes itself"),
        (b"@other", "@preset: the file includes itself"),
        (b"--n 0", "argument --n: expected a whole number, 1 or more, got '0'"),
    ],
)
def test_a_file_of_flags_that_cannot_be_taken(tmp_path, monkeypatch, capsys, data, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_text("@preset")
    if data is not None:
        (tmp_path / "preset").write_bytes(data)
    assert message in error_of(["@preset"], capsys)


# ------------------------------------------------------------------------------------------------
# Errors of a stage


def ending(problem):
    """The line with which a stage ends."""

    def main():
        raise problem

    with pytest.raises(SystemExit) as stop:
        flags.run_stage("rl.py", main)
    return stop.value.code


def test_a_stage_prints_what_can_be_fixed_in_one_harmless_line():
    assert ending(InputError("fix it")) == "rl.py: fix it"
    assert ending(FileNotFoundError("restore it")) == "rl.py: restore it"
    assert ending(InputError("a\n\tb\x1b[2J\u202e\ud800")) == r"rl.py: a b\x1b[2J\u202e\ud800"
    long = ending(InputError("the file " + "x" * 10**6 + " do this"))
    assert len(long) == 400 and long.startswith("rl.py: the file") and long.endswith("do this")


@pytest.mark.parametrize(
    "number, message",
    [
        (errno.ENOENT, "x/y: No such file or directory; check the path"),
        (errno.EACCES, "x/y: Permission denied; check its owner and mode"),
        (errno.EISDIR, "x/y: Is a directory; give a file"),
        (errno.ENOTDIR, "x/y: Not a directory; a file stands where a folder is needed"),
        (errno.ENOSPC, "x/y: No space left on device; free some space; the same command continues"),
    ],
)
def test_errors_of_the_file_system_that_a_user_can_fix_say_how(number, message):
    assert ending(OSError(number, os.strerror(number), "x/y")).startswith(f"rl.py: {message}")


@pytest.mark.parametrize("problem", [KeyError("x"), OSError(errno.EBADF, "ours"), OSError("ours")])
def test_what_only_we_can_fix_keeps_its_traceback(problem):
    with pytest.raises(type(problem)):
        ending(problem)


def test_a_stage_that_is_stopped_says_that_it_can_go_on():
    assert ending(KeyboardInterrupt()) == "rl.py: stopped; the same command continues from here"


def test_of_many_ranks_one_speaks(monkeypatch):
    """The others wait to be ended by torchrun before they say the same, and leave Ctrl-C to it."""
    waited = []
    monkeypatch.setattr(flags.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "0")
    assert ending(InputError("fix it")) == "rl.py: fix it"
    assert waited == []
    monkeypatch.setenv("RANK", "1")
    assert ending(InputError("fix it")) == "rl.py: fix it"
    assert len(waited) == 1
    assert ending(KeyboardInterrupt()) == 1
    for how in ("closed", "reset"):
        lost = RuntimeError(f"[gloo] Connection {how} by peer [127.0.0.1]:1234")
        assert ending(lost) == "rl.py: another rank has ended; what it printed says why"
    with pytest.raises(RuntimeError):
        ending(RuntimeError("shapes do not fit"))
