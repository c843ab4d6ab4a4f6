"""Is an answer the ground truth?"""

import re

ANSWER = re.compile(r"<answer>(.*?)</answer>|\\boxed\{([^{}]*)\}", re.DOTALL)
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def exact(text, answer):
    r"""
    1.0 if the answer is the ground truth. It is the content of the last <answer> or \boxed{} where
    there is one; of an option, its letter counts.

    >>> exact("Red.", "red"), exact("It is red.", "red"), exact("1,200", "1200.0")
    (1.0, 0.0, 1.0)
    >>> exact("Hence <answer>(B) two</answer>", "B")
    1.0
    """
    # behind the last </answer>, a search for another one would go to the end from each <answer>
    before, end, after = text.rpartition("</answer>")
    marked = BOXED.findall(after) or ["".join(parts) for parts in ANSWER.findall(before + end)]
    if marked:
        text = marked[-1]
    given, truth = plain(text), plain(answer)
    option = re.match(r"\(?([a-j])(?:[).:]|$)", given)
    if option and re.fullmatch("[a-j]", truth):
        given = option[1]
    number = r"-?\d+(\.\d+)?"
    if re.fullmatch(number, given) and re.fullmatch(number, truth):
        return float(float(given) == float(truth))
    return float(given == truth)


def plain(text):
    """The text without a thousands' comma, a full stop at its end, capitals."""
    return re.sub(r"(?<=\d),(?=\d{3})", "", text).strip().rstrip(".").casefold()
