"""
What a judge is asked, and how its verdict is read (evaluate.py --prompt).

`paper` is Table 1; other names are files in core/judge_prompts; all else is a file of one's own:

    text = "... {question} ... {answer1} ... {answer2} ..."  # several lines stand between '''
    pictures = "before"            # where they stand, seen from the text; or "after"
    verdicts = ["[[A]]", "[[B]]"]  # what stands for 1 and for 2; without it: <answer>1</answer>
    max_pixels = 501_760           # what it was published with, if there is no such flag
    max_new_tokens = 4096
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from core.files import InputError
from core.judgements import digest, strict_choice
from core.lenient import after_the_thought
from core.pairs import JUDGING_PROMPT, is_int, is_string, judging_turns, shown

FOLDER = Path(__file__).with_name("judge_prompts")
NAMES = ("paper", *sorted(path.stem for path in FOLDER.glob("*.toml")))
PLACEHOLDERS = ("{question}", "{answer1}", "{answer2}")


@dataclass(frozen=True)
class JudgePrompt:
    text: str  # with the placeholders
    pictures: str = "before"
    verdicts: list | None = None  # None: the digit in the last <answer> block
    max_pixels: int | None = None  # None: the model's own bound
    max_new_tokens: int = 4096

    def turns(self, pair, swapped=False):
        """How a pair is shown to the judge."""
        turns = judging_turns(pair, swapped, self.text)
        if self.pictures == "after":
            content = turns[0]["content"]
            content.insert(0, content.pop())
        return turns

    def choice_of(self, text):
        """The verdict, strictly: 1, 2, or None for neither or for both."""
        if self.verdicts is None:
            return strict_choice(text)
        conclusion = after_the_thought(text)
        found = [verdict in conclusion for verdict in self.verdicts]
        return {(True, False): 1, (False, True): 2}.get(tuple(found))

    def digest(self):
        """Of what no other flag says: the text alone, if all else is as in Table 1."""
        if self.pictures == "before" and self.verdicts is None:
            return digest(self.text)
        return digest(self.text, self.pictures, self.verdicts)


def is_two_verdicts(value):
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_string, value)):
        return False
    return all(text.strip() for text in value) and not (
        value[0] in value[1] or value[1] in value[0]
    )


CHECKS = {  # field: what is expected, the check
    "text": (
        f"a string with {', '.join(PLACEHOLDERS)}",
        lambda v: is_string(v) and all(place in v for place in PLACEHOLDERS),
    ),
    "pictures": ('"before" or "after" the text', lambda v: v in ("before", "after")),
    "verdicts": (
        "two strings that stand for 1 and for 2, none of them in the other one",
        is_two_verdicts,
    ),
    "max_pixels": ("a whole number, 1 or more", lambda v: is_int(v) and v > 0),
    "max_new_tokens": ("a whole number, 1 or more", lambda v: is_int(v) and v > 0),
}


def load_prompt(name):
    """The JudgePrompt of a name or of a file."""
    if name == "paper":
        return JudgePrompt(JUDGING_PROMPT)
    path = FOLDER / f"{name}.toml" if name in NAMES else Path(name)
    try:
        fields = tomllib.loads(path.read_bytes().decode())
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        expected = f"expected {', '.join(NAMES)} or a TOML file (see core/judge_prompt.py)"
        raise InputError(f"--prompt {name}: {reason}; {expected}") from None
    for field in fields.keys() - CHECKS.keys():
        raise InputError(f"--prompt {name}: {field!r} is none of {', '.join(CHECKS)}; remove it")
    if "text" not in fields:
        raise InputError(f"--prompt {name} has no 'text'; expected {CHECKS['text'][0]}")
    for field, value in fields.items():
        expected, is_valid = CHECKS[field]
        if not is_valid(value):
            raise InputError(f"--prompt {name}: {field!r} is {shown(value)}; expected {expected}")
    return JudgePrompt(**fields)


def take_published_settings(args):
    """Fills in what a prompt was published with, where no flag says otherwise."""
    prompt = load_prompt(args.prompt)
    args.max_pixels = args.max_pixels or prompt.max_pixels
    args.max_new_tokens = args.max_new_tokens or prompt.max_new_tokens
