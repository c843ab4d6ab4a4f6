"""The command line of a stage: types of flags, flags in files, errors in one line."""

import argparse
import contextlib
import difflib
import errno
import json
import math
import os
import re
import shlex
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from core.files import InputError

# ------------------------------------------------------------------------------------------------
# Types of flags


def whole(least=0, most=10**9):
    """The type of a flag: a whole number from `least` to `most`."""
    if most == 10**9:
        return _within(int, least, most, f"a whole number, {least} or more")
    return _within(int, least, most, f"a whole number from {least} to {most}")


def number(least=0.0, most=sys.float_info.max):
    """The type of a flag: a finite number from `least` to `most`."""
    if most == sys.float_info.max:
        return _within(float, least, most, f"a number, {least:g} or more")
    return _within(float, least, most, f"a number from {least:g} to {most:g}")


def above_zero(most=sys.float_info.max):
    """The type of a flag: a finite number above 0 and at most `most`."""
    expected = "a number above 0"
    if most < sys.float_info.max:
        expected += f" and at most {most:g}"
    return _within(float, math.nextafter(0, 1), most, expected)


def _within(kind, least, most, expected):
    def value_of(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value <= most:  # nan is not
                return value
        raise _unexpected(expected, text)

    return value_of


random_seed = whole(0, 2**32 - 1)  # what every random generator takes


def json_object(text):
    """The type of a flag: a JSON object."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise _unexpected("""a JSON object such as '{"top_p": 0.9, "seed": null}'""", text)


def add_request_flag(add, name="--request"):
    """Fields of a stage's requests to a server; its client takes them as they are."""
    example = '{"max_tokens": null, "max_completion_tokens": 2048}'
    text = f"fields to add to each request to the server; null removes one: {example}"
    add(name, type=json_object, default={}, metavar="JSON", help=text)


def add_price_flag(add, purpose, default=None):
    """What a server's tokens cost, see core.endpoint.cost()."""
    text = f"dollars for a million tokens that the server reads and writes, {purpose}"
    add("--price", type=number(), nargs=2, default=default, metavar=("IN", "OUT"), help=text)


def server_url(text):
    """
    The type of a flag: the address of an OpenAI-compatible server.

    It is written to files and printed, so nothing secret may be in it.
    """
    if re.search("[@?#]", text):
        raise argparse.ArgumentTypeError(
            "expected an address without user, password, ? and #, because it is written to files; "
            "a key belongs in OPENAI_API_KEY"
        )
    try:
        address = urlsplit(text)
        is_valid = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # of a port or of an IPv6 address
        is_valid = False
    if not is_valid or not re.fullmatch("[!-~]{1,200}", text):
        raise _unexpected("an address such as http://127.0.0.1:8000/v1", text)
    return text


def _unexpected(expected, text):
    return argparse.ArgumentTypeError(f"expected {expected}, got {text[:60]!r}")


# ------------------------------------------------------------------------------------------------
# The parser


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written; a flag's default after its help, where it has one."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default in ([], {}, argparse.SUPPRESS):
            return action.help
        if isinstance(default, list):
            default = " ".join(map(str, default))
        return f"{action.help} [{default}]"


class Parser(argparse.ArgumentParser):
    """@FILE inserts the flags written in a file. An error is one line, without the usage."""

    def parse_known_args(self, args=None, namespace=None):
        words = self._insert_files(sys.argv[1:] if args is None else args)
        self._check_names(words)
        found, rest = super().parse_known_args(words, namespace)
        for name, value in vars(found).items():
            if value == "" or (isinstance(value, list) and "" in value):
                self.error(f"argument --{name}: expected a value, got an empty one")
        return found, rest

    def error(self, message):
        self.exit(2, one_line(f"{self.prog}: {message}; see --help") + "\n")

    def _insert_files(self, words, inside=()):
        """The words of the command line, with those of each @FILE in its place."""
        inserted = []
        for word in words:
            if not word.startswith("@"):
                inserted.append(word)
                continue
            path = Path(word[1:])
            if path in inside:
                self.error(f"{word}: the file includes itself")
            inserted += self._insert_files(self._words_of_file(path), (*inside, path))
        return inserted

    def _words_of_file(self, path):
        """The words of a file: as in a shell, several on a line, and # begins a comment."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            self.error(f"@{path}: expected a text file of flags, and this is not UTF-8")
        except (OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", None) or problem
            self.error(f"@{path} cannot be read: {reason}")
        words = []
        for number_of_line, line in enumerate(lines, 1):
            try:
                words += shlex.split(line, comments=True)
            except ValueError as problem:
                self.error(f"@{path}, line {number_of_line}: {problem}; close it on this line")
        return words

    def _check_names(self, words):
        known = []
        for action in self._actions:
            known += action.option_strings
        for word in words:
            name = word.partition("=")[0]
            if not name.startswith("--") or name == "--" or name in known or " " in name:
                continue
            similar = difflib.get_close_matches(name, known, n=1)
            hint = f"; perhaps {similar[0]} is meant" if similar else ""
            self.error(f"unknown flag {name}{hint}")


def command_line(doc):
    """A stage's parser, described by its docstring."""
    return Parser(
        description=doc,
        epilog="[...]: the default. (ours): the paper states no value. @FILE: the flags in a file.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )


def defaults(parser):
    """{name of a flag: its default}."""
    found = {action.dest: parser.get_default(action.dest) for action in parser._actions}
    del found["help"]
    return found


# ------------------------------------------------------------------------------------------------
# Errors

LONGEST = 400  # characters of an error
ADVICE = {  # what to do about the errors of the file system that the user can fix
    errno.ENOENT: "check the path",
    errno.EACCES: "check its owner and mode, or choose another path",
    errno.EPERM: "check its owner and mode, or choose another path",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another path",
    errno.EEXIST: "a file stands where a folder is needed; choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "check its links",
    errno.ENOSPC: "free some space; the same command continues",
    errno.EDQUOT: "free some space; the same command continues",
    errno.EMFILE: "raise the limit (ulimit -n)",
}


def one_line(text):
    """
    A text as a line of at most 400 characters, whose control characters do nothing.

    >>> one_line("a\\nb\\x1b[2J")
    'a b\\\\x1b[2J'
    """
    words = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)
    if len(line) <= LONGEST:
        return line
    return f"{line[:250]} ... {line[-(LONGEST - 255) :]}"  # the end says what to do


def fixable(error):
    """What to tell of an error of the file system, or None if it is not for the user to fix."""
    path = error.filename2 or error.filename  # of a rename the new name
    if error.errno in ADVICE and path is not None:
        return f"{path}: {error.strerror}; {ADVICE[error.errno]}"
    if error.errno in ADVICE:
        return f"{error.strerror}; {ADVICE[error.errno]}"
    return str(error) if isinstance(error, FileNotFoundError) else None


def run_stage(script_name, main, if_stopped="the same command continues from here"):
    """Runs main(). What the user can fix is one line; anything else is our bug and a traceback."""
    is_rank_0 = os.environ.get("RANK", "0") == "0"
    try:
        return main()
    except InputError as error:
        message = str(error)
    except OSError as error:
        message = fixable(error)
        if message is None:
            raise
    except RuntimeError as error:
        if not re.search("Connection (closed|reset) by peer", str(error)):  # gloo's words
            raise
        message = "another rank has ended; what it printed says why"
    except KeyboardInterrupt:
        if not is_rank_0:  # all ranks hear Ctrl-C, one says so
            sys.exit(1)
        message = f"stopped; {if_stopped}"
    if not is_rank_0:
        # Mostly all ranks fail alike. torchrun ends those that wait here, and one line is printed.
        time.sleep(5)
    sys.exit(one_line(f"{script_name}: {message}"))
