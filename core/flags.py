"""The command line of a stage: flags in files, defaults in the help, errors without a traceback."""

import argparse
import contextlib
import json
import shlex
import sys

from core.files import InputError


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written; a flag's default after its help, where it has one."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default in ([], {}, argparse.SUPPRESS):
            return action.help
        if isinstance(default, list):
            default = " ".join(map(str, default))
        return f"{action.help} [{default}]"


def command_line(doc):
    """A parser. @file inserts the flags written in it, several on a line; # begins a comment."""
    parser = argparse.ArgumentParser(
        description=doc,
        epilog="[...]: the default. (ours): the paper states no value. @FILE: the flags in a file.",
        formatter_class=HelpFormatter,
        fromfile_prefix_chars="@",
    )
    parser.convert_arg_line_to_args = _words_of_line
    return parser


def _words_of_line(line):
    return shlex.split(line, comments=True)


def at_least(least, kind=int):
    """The type of a flag: a finite number, `least` or more."""

    def number(text):
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {text}")
        return value

    return number


def share(text):
    """The type of a flag: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, got {text}")
    return value


def json_object(text):
    """The type of a flag: a JSON object."""
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise argparse.ArgumentTypeError(
        f"""expected a JSON object such as '{{"top_p": 0.9, "seed": null}}', got {text!r}"""
    )


def run_stage(script_name, main, if_stopped="the same command continues from here"):
    """Runs main(). What the user can fix is printed without a traceback."""
    try:
        return main()
    except (InputError, FileNotFoundError) as error:
        sys.exit(f"{script_name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{script_name}: stopped; {if_stopped}")
