"""results.json of evaluate.py as a table in Markdown and as Figure 3."""

from core.tables import markdown_table
from sources import BENCHMARKS

WITH_INTERVAL = ("overall", "Acc+", "best answer first", "rank correlation")  # columns


ALWAYS_FIRST = (
    "**WARNING: the better answer is always shown first. A model that always says 1 has 100 % here "
    "(line `always 1`); with --orders both it has 50 %.**"
)


def results_table(results):
    """results.json -> Markdown."""
    args = results["args"]
    parts = [f"# {name_of_judge(args)}", ""]
    for bench, result in results["benches"].items():
        parts += [_heading(bench, result, args), ""]
        if args["orders"] == "chosen_first":
            parts += [ALWAYS_FIRST, ""]
        parts += _left_out(result, args)
        parts += _ranking(result.get("ranking"))
        if not result["lines"]:
            parts += ["No row has all its judgements yet.", ""]
            continue
        parts += [_table_of_bench(bench, result) + _below(result["about"]), ""]
        parts += [f"- {note}" for note in result["check"]]
        parts += _comparison(result.get("compared", {}), args["compare"])
        parts.append("")
    return "\n".join(parts)


def name_of_judge(args):
    """The file of its rewards or judgements, or the model."""
    return args["judgements"] or args["scores"] or args["model"]


def _heading(bench, result, args):
    rows, samples = result["about"]["rows"], args["samples"]
    missing = result["about"]["rows left out, not judged to the end"]
    of_all = f" of {rows + missing}" if missing else ""
    made = f"{samples} judgements a row"
    if not args["judgements"]:
        made += f" at temperature {args['temperature']:g}"
    read = f", prompt: {args['prompt']}" if args["prompt"] != "paper" else ""
    read += ", verdicts read leniently" if args["parse"] == "lenient" else ""
    read += ", equal rewards half right" if args["ties"] == "half" else ""
    return f"## {bench}: {rows}{of_all} rows, {made}, orders: {args['orders']}{read}"


def _left_out(result, args):
    """How many rows the numbers are not of, what they would do to the first of them, and which."""
    lines = result["left_out"]
    if not lines:
        return []
    about = result["about"]
    judged = about["rows"]
    missing = about["rows left out, not judged to the end"]
    total = judged + missing + about.get("duels of equally good answers", 0)
    reason = ", not in the file" if args["judgements"] else ": no judge took them"
    text = f"**WARNING: {len(lines)} of {total} rows left out{reason}.**"
    if result["lines"]:
        wrong = result["lines"]["one sample"]["overall"][0] * judged / (judged + missing)
        text += f" With all {missing} rows without judgement counted as wrong, one sample "
        text += f"has {wrong:.2f} % overall."
    if not args["judgements"]:
        text += " --retry_left_out asks for them again."
    text += " All of them are in left_out.jsonl:"
    named = [f"- {line['bench']} row {line['row']}: {line['reason']}" for line in lines[:10]]
    return [text, "", *named, ""]


def _ranking(ranking):
    """The table of whole lists, above that of their duels."""
    if not ranking:
        return []
    missing = ranking["lists left out, not judged to the end"]
    text = f"{ranking['lists']} lists, ranked by the share of its duels that each answer wins"
    if missing:
        text += f"; **{missing} more are left out, not judged to the end**"
    text += ". A row of the other table is a duel, so its overall is the accuracy on pairs."
    if not ranking["lists"]:
        return [text, ""]
    columns = list(ranking["lines"]["the judge"])
    heads = {"rank correlation": f"rank correlation ({ranking['rankings']} with ranks)"}
    rows = []
    for name, values in ranking["lines"].items():
        rows.append([name, *(_cell(column, values[column]) for column in columns)])
    table = markdown_table(["", *(heads.get(column, column) for column in columns)], rows)
    return [text, "", table, ""]


def _below(about):
    numbers = [f"{name}: {number}" for name, number in about.items() if number is not None]
    return f"Percent, with 95 % intervals over rows. {'; '.join(numbers)}."


def _table_of_bench(bench, result):
    lines = result["lines"]
    columns = list(next(iter(lines.values())))
    head = ["", *(_column_head(column, result["groups"]) for column in columns)]
    rows = []
    for method, values in lines.items():
        rows.append([method, *(_cell(column, values[column]) for column in columns)])
    rows += _paper_rows(bench, columns)
    return markdown_table(head, rows)


def _column_head(column, groups):
    """The name, and of a group its number of rows."""
    grouping, _, group = column.partition(": ")
    count = groups.get(grouping, {}).get(group)
    return column if count is None else f"{column} ({count})"


def _cell(column, values):
    value, low, high = values
    if value is None:
        return ""
    if column in WITH_INTERVAL:
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"
    return f"{value:.2f}"


def _paper_rows(bench, columns):
    if bench not in BENCHMARKS:
        return []
    data_set = BENCHMARKS[bench]
    rows = []
    for (method, protocol), numbers in data_set.PAPER_ROWS.items():
        cells = {}
        for column, number in zip(data_set.PAPER_COLUMNS, numbers):
            cells[column] = "" if number is None else f"{number:.2f}"
        name = f"*{method} (in the paper; {protocol})*"
        rows.append([name, *(cells.get(column, "") for column in columns)])
    return rows


def _comparison(compared, other_run):
    lines = []
    for method, columns in compared.items():
        gain, low, high, p = columns["overall"]
        if gain is None:  # no row was shown in this way
            continue
        difference = f"{gain:+.2f} points [{low:+.2f}, {high:+.2f}], p = {p:.3g}"
        lines.append(f"- {method}, against {other_run}: {difference}, on {columns['rows']} rows")
    return lines


def plot_scaling(results, path):
    """Figure 3: vote and any against the number of samples, a panel for each benchmark."""
    from matplotlib.figure import Figure

    panels = {}
    for bench, result in results["benches"].items():
        if result["scaling"]:
            panels[bench] = result["scaling"]
    if not panels:
        return
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (bench, scaling) in zip(axes, panels.items()):
        _plot_panel(axis, scaling)
        axis.set(title=bench, xlabel="samples a row", ylabel="overall accuracy, %")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def _plot_panel(axis, scaling):
    samples = list(scaling)
    for name, colour in (("vote", "#1f5fa8"), ("any", "#b8602a")):
        value, low, high = zip(*(of_k[name] for of_k in scaling.values()))
        axis.plot(samples, value, "o-", color=colour, markersize=3, label=name)
        axis.fill_between(samples, low, high, color=colour, alpha=0.15, linewidth=0)
    coin = [of_k["any of a coin"] for of_k in scaling.values()]
    axis.plot(samples, coin, ":", color="grey", label="any, of a coin")
