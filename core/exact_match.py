"""Is an answer the ground truth?"""

import re


def exact(text, answer):
    r"""
    1.0 if the answer is the ground truth. It is the content of the last <answer> or \boxed{} where
    there is one; of an option, its letter counts.

    >>> exact("Red.", "red"), exact("It is red.", "red"), exact("1,200", "1200.0")
    (1.0, 0.0, 1.0)
    >>> exact("Hence <answer>(B) two</answer>", "B")
    1.0
    """
    marked = re.findall(r"<answer>(.*?)</answer>|\\boxed\{([^{}]*)\}", text, re.DOTALL)
    if marked:
        text = "".join(marked[-1])
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
