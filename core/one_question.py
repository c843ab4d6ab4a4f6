"""evaluate.py --question: which of these answers is better? As text, or as JSON."""

import json

from core.files import InputError
from core.judge_in_python import decide, ranking
from core.pictures import BadPicture, open_picture

FLAGS = ("question", "images", "answers", "json")


def add_question_flags(add):
    add(
        "--question",
        metavar="TEXT",
        help="judge the --answers to this question, --samples times [2], and print what the judge "
        "says; nothing is written to files",
    )
    add("--images", nargs="+", default=[], metavar="FILE", help="pictures that it is about")
    answers_help = "two answers to choose from, or more to rank by duels of each two"
    add("--answers", nargs="+", default=[], metavar="TEXT", help=answers_help)
    add("--json", action="store_true", help="print one JSON object on one line")


def check_question(args, of_runs):
    """Refuses what has no meaning for one question. of_runs: {flag of runs over files: default}."""
    if not args.question:
        for name in FLAGS:
            if getattr(args, name):
                raise InputError(f"--{name} belongs to one question; give its --question as well")
        return
    if len(args.answers) < 2:
        raise InputError(f"--question needs two --answers or more, got {len(args.answers)}")
    for name, default in of_runs.items():
        if getattr(args, name) != default:
            raise InputError(
                f"--{name} is for rows in files; leave it out, or leave out --question"
            )
    check_images(args)


def check_images(args):
    for path in args.images:
        try:
            open_picture(path)
        except BadPicture as problem:
            raise InputError(f"--images {path}: {problem.reason}; expected a picture") from None


def answer(judge, args):
    """Asks a Judge, and prints what it says."""
    judged_duels = judge.judged_duels(args.question, args.images, args.answers)
    told = []
    for row, judgements in judged_duels:
        told += [tell(row, judgement) for judgement in judgements]
    if len(args.answers) == 2:
        ((_, judgements),) = judged_duels
        decision = decide(judgements)
        found, conclusion = decision._asdict(), conclusion_of(decision)
    else:
        places = [{"answer": place + 1, "won": won} for place, won in ranking(judged_duels)]
        found, conclusion = {"ranking": places}, table_of(places)
    if args.json:
        print(json.dumps(found | {"judgements": told}))
        return
    for one in told:
        print(f"{heading(one)}\n{one['text']}\n")
    print(conclusion)


def tell(row, judgement):
    """A judgement, with the numbers of the answers as they were given."""
    first, second = [place + 1 for place in row.duel.answers]
    winner = {1: first, 2: second, None: None}[judgement.verdict]
    if judgement.order == 1:
        first, second = second, first
    return {"first": first, "second": second, "better": winner, "text": judgement.text}


def heading(told):
    shown = f"Answer {told['first']} was shown first, answer {told['second']} second"
    if told["better"] is None:
        return f"{shown}; no verdict:"
    return f"{shown}; answer {told['better']} is the better one:"


def conclusion_of(decision):
    ones, twos, none = decision.votes
    conclusion = f"Answer {decision.choice} is better" if decision.choice else "Undecided"
    votes = f"votes: {ones} for answer 1, {twos} for answer 2, {none} without a verdict"
    orders = {
        True: "both orders of the answers agree",
        False: "the two orders of the answers do not agree",
        None: "only one order of the answers was judged",
    }
    return f"{conclusion}; {votes}; {orders[decision.orders_agree]}."


def table_of(places):
    lines = ["answer  duels won"]
    lines += [f"{place['answer']:<6}  {place['won']:.0%}" for place in places]
    return "\n".join(lines)
