"""
A lenient reading of verdicts, for judges that were not trained to our format (--parse lenient).

Only what comes after the thought counts; a thought that was never closed has no verdict. Two kinds
of forms are read:

    marks        nothing but a verdict: a tag, a box, [[A]], "verdict": 2, "Final verdict: 2",
                 a last line that is only "2" or "Response 2"
    statements   sentences such as "Response 2 is better"; those that conclude ("overall",
                 "therefore", ...) go before the others

What is found must agree, or there is no verdict. Not read are questions, conditions, negations,
what somebody might think, what is better "in style" only, and "the answer is 2", which may be about
the picture. The letters A and B are labels only where the text calls its two answers so.
"""

import re
import unicodedata

from stable_reinforce import parse

# ------------------------------------------------------------------------------------------------
# Patterns

NOUN = r"\b(?:response|answer|option|assistant|candidate|model|output|description|caption)"
LABEL = r"[(\[]?([12])[)\]]?(?![\w'’/])"
BETTER_ONE = (
    r"\b(?:better|best|preferred|superior|winning|stronger) (?:response|answer|choice|one)\b"
)
NAMED = r"(?:verdict|choice|decision|judge?ment|winner|preference|conclusion)"
WORDS = {
    # Response 1, answer (2), the second one
    "ANSWER": rf"(?:{NOUN}\s*{LABEL}|\b(first|second) (?:{NOUN}|one)\b)",
    "OTHER": rf"(?:{NOUN} ?)?[12]",
    "BETTER": "(?:better|superior|preferable|preferred|best|stronger|winner)",
    "WORSE": "(?:worse|inferior|weaker|loser)",
    # "better in style" and "better supported" say little
    "ALL_IN_ALL": r"(?:$|[^\w\s]| (?:than|to|over|here|response|answer|choice|one|of two)\b"
    r"| in (?:every|all|most|general|this)\b)",
    "BETTER_ONE": BETTER_ONE,
    "VERDICT": rf"\b(?:{NAMED}|(?:final|overall|my) answer|{BETTER_ONE})",
    "IS": "(?:is|was|seems|appears|remains|comes out as|stands out as)(?: to be)?",
}


def pattern(text):
    """A regular expression, whose words in capitals are replaced by their meaning."""
    for word, meaning in WORDS.items():
        text = re.sub(rf"\b{word}\b", lambda _, meaning=meaning: meaning, text)
    return re.compile(text, re.IGNORECASE | re.DOTALL)


MARKS = [  # what they enclose is a verdict, or is none
    pattern(r"<answer>(.*?)(?:</answer>|\Z)"),
    pattern(r"\\boxed\s*\{(?:\\text\s*\{)?([^{}]*)\}"),
    pattern(r"\[\[([^\[\]]*)\]\]"),
    pattern(rf'"(?:\w+[ _])?(?:{NAMED}|answer|better|preferred)\w*"\s*:\s*"?([^",}}]*)'),
]
VERDICT_SENTENCE = pattern(
    r"(?:(?:so|therefore|thus|hence)\W )?(?:(?:my|the|your|our|final|overall) )*"
    r"VERDICT\s*(is:|:|=|is|would be|)\s*(.*)"
)
ALONE = [pattern(r"\W*ANSWER\W*"), pattern(r"[^\w-]*([12])\W*")]

FOR_THEIR_SUBJECT = [
    pattern("ANSWER IS BETTER(?=ALL_IN_ALL)"),
    pattern(r"ANSWER (?:wins|outperforms)\b"),
    pattern(r"ANSWER (?:should|must) be (?:preferred|chosen|selected)\b"),
    pattern(r"ANSWER ?>+ ?OTHER\W*$"),
]
AGAINST_THEIR_SUBJECT = [
    pattern("ANSWER IS WORSE(?=ALL_IN_ALL)"),
    pattern(r"ANSWER ?<+ ?OTHER\W*$"),
]
FOR_THEIR_OBJECT = [
    pattern(
        r"\b(?:I|we)(?:['’](?:d|ll|m)| am| would| will| must)? "
        r"(?:prefer|choose|chose|select|pick|favou?r|vote for|go with|going with) ANSWER"
    ),
    pattern(r"BETTER_ONE(?: here)? (?:is|would be) ANSWER"),
]

# ------------------------------------------------------------------------------------------------
# What is around them

FILLERS = pattern(
    r"\b(?:the|a|an|also|still|clear|clearly|overall|much|far|slightly|significantly|considerably|"
    r"marginally|obviously|ultimately|definitely|therefore|thus|indeed) "
)
SENTENCE_ENDS = pattern(r"(?<=[.!?]) ")
CLAUSE_ENDS = pattern(
    r"[,;:]\s|\s[-–—]\s|\s(?:because|since|as it|but|while|whereas|although|though|despite|due to|"
    rf"given that|so(?! much)|and(?= {NOUN}))\s"
)
CONDITION = pattern(r"\b(?:if|whether|unless)\b")
NO_STATEMENT = pattern(
    r"\b(?:not|never|neither|nor|cannot|no|none|nothing|nobody|hardly|might|could|may|either|some|"
    r"people|others|anyone)\b|n['’]t\b"
)
NOT_A_SUBJECT_AFTER = pattern(  # "Response 2 compared to | Response 1 is better"
    r"\b(?:of|in|by|from|than|to|unlike|over|against|and|or|with|versus|vs|for) $"
)
TIE = pattern(r"\ba (?:tie|draw)\b|\bequally good\b|\bequal quality\b")
CONCLUDES = pattern(
    r"\b(?:overall|therefore|thus|hence|in conclusion|to conclude|in summary|ultimately|all in all|"
    r"on balance|finally|so)\b"
)
THINK_OPENS, THINK_CLOSES = pattern("<think(?:ing)?>"), pattern("</think(?:ing)?>")
SIGNS = pattern(r'[*_`#$"“”{}]|\\text|\\boxed')  # of Markdown and LaTeX
CALLED_BY_NUMBER = pattern(rf"{NOUN}\s*[#(\[]*[12]\b")
CALLED_BY_LETTER = re.compile(
    r"\b(?i:response|assistant|candidate|model|output|description|caption)\s*[(\[]*[AB]\b"
)

# ------------------------------------------------------------------------------------------------
# The reading


def lenient_choice(text):
    """
    1, 2, or None for no clear verdict. What is read strictly is read so.

    >>> lenient_choice("Both see the car. Overall, Response 2 is better."), lenient_choice("[[A]]")
    (2, 1)
    >>> print(lenient_choice("Response 1 is better. Response 2 is better."))
    None
    """
    strict = parse(text).choice
    if strict is not None:
        return strict
    conclusion = after_the_thought(with_plain_labels(text))
    marks = found_in_marks(conclusion)
    said, concluded = found_in_sentences(conclusion)
    return the_one_of(marks + concluded or said)


def after_the_thought(text):
    """The rest of a text; "" if a thought was never closed."""
    rest = THINK_CLOSES.split(text)[-1]
    return "" if THINK_OPENS.search(rest) else rest


def with_plain_labels(text):
    """Full-width, circled and other digits become 1 and 2, and so do the letters A and B."""
    text = unicodedata.normalize("NFKC", text)
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    letters = {"A": "1", "B": "2"}
    text = re.sub(
        r"\[\[\s*([AB])\s*\]\]",
        lambda found: f"[[{letters[found[1].upper()]}]]",
        text,
        flags=re.IGNORECASE,
    )
    if CALLED_BY_NUMBER.search(text) or not CALLED_BY_LETTER.search(text):
        return text
    return re.sub(r"(?<![\w'’])[AB](?![\w'’])", lambda found: letters[found[0]], text)


def plain(text):
    return " ".join(SIGNS.sub("", text).split())


def the_one_of(choices):
    """The choice that all agree on; a None among them is a verdict that is neither."""
    return choices[0] if len(set(choices)) == 1 else None


def named_by(match):
    """The choice whose label is the match's group."""
    label = next(group for group in match.groups() if group)
    return {"1": 1, "first": 1, "2": 2, "second": 2}[label.lower()]


def alone_in(text):
    """The choice if there is nothing but its name, else None."""
    for only_a_name in ALONE:
        match = only_a_name.fullmatch(FILLERS.sub("", text))
        if match:
            return named_by(match)
    return None


def found_in_marks(text):
    choices = []
    for mark in MARKS:
        choices += [choice_of_content(content) for content in mark.findall(text)]
    for sentence in sentences_of(text):
        choices += found_in_sentence_of_verdict(sentence)
    last_line = plain(text.rstrip().rpartition("\n")[2])
    last = alone_in(re.sub(r"(?i)^\W*answer\s*[:=]\s*", "", last_line))
    return [*choices, last] if last else choices


def sentences_of(text):
    """Plain sentences; a line ends one, and a row of a table is one."""
    sentences = []
    for line in text.splitlines():
        sentences += SENTENCE_ENDS.split(plain(without_cells(line)))
    return sentences


def without_cells(line):
    """
    The row of a table as a line.

    >>> without_cells("| Verdict | Response 2 |")
    'Verdict : Response 2'
    """
    return re.sub(r"^\s*\|([^|]*)\|([^|]*)\|\s*$", r"\1:\2", line).strip()


def found_in_sentence_of_verdict(sentence):
    match = VERDICT_SENTENCE.fullmatch(re.sub(r"^\W+", "", sentence))
    if not match:
        return []
    between, content = match.groups()
    if ":" in between or "=" in between:
        return [choice_of_content(content)] if content else []
    choice = alone_in(content)
    return [choice] if choice else []


def choice_of_content(content):
    """What a mark encloses: a label, or a sentence such as "1 is better than 2"."""
    content = plain(content)
    choice = alone_in(content)
    if choice is None:
        said, concluded = found_in_sentences(re.sub(r"^\W*(?=[12]\b)", "Response ", content))
        choice = the_one_of(concluded or said)
    return choice


def found_in_sentences(text):
    """(the choices of all statements, those of the sentences that conclude)."""
    said, concluded = [], []
    for sentence in sentences_of(text):
        if sentence.endswith("?") or CONDITION.search(sentence):
            continue
        choices = []
        for clause in CLAUSE_ENDS.split(sentence):
            choices += found_in_clause(clause)
        said += choices
        concluded += choices if CONCLUDES.search(sentence) else []
    return said, concluded


def found_in_clause(clause):
    if NO_STATEMENT.search(clause):
        return []
    choices = [None] if TIE.search(clause) else []
    clause = FILLERS.sub("", clause)
    for match in matches_of(FOR_THEIR_OBJECT, clause):
        choices.append(named_by(match))
    for match in matches_of(FOR_THEIR_SUBJECT, clause):
        if is_subject(match):
            choices.append(named_by(match))
    for match in matches_of(AGAINST_THEIR_SUBJECT, clause):
        if is_subject(match):
            choices.append(3 - named_by(match))
    return choices


def matches_of(patterns, clause):
    for one in patterns:
        yield from one.finditer(clause)


def is_subject(match):
    before = match.string[max(0, match.start() - 12) : match.start()]
    return NOT_A_SUBJECT_AFTER.search(before) is None
