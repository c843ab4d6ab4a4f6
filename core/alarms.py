"""
Signs, in the log of a reinforcement learning run, that it goes wrong, with the likely cause and
what to do. Each is a function of the rows of all steps so far; they look at the last five.
"""

RECENT = 5  # steps
ROUNDING = 2e-6  # so far apart are vLLM and the trainer in float32, whatever happens


def mean_of(rows, key):
    """None if no row has a number there."""
    numbers = [row[key] for row in rows if row.get(key) is not None]
    return sum(numbers) / len(numbers) if numbers else None


def recent(rows, key):
    return mean_of(rows[-RECENT:], key)


def format_falls(rows):
    now, best = recent(rows, "format"), 0.0
    for end in range(RECENT, len(rows)):
        best = max(best, mean_of(rows[end - RECENT : end], "format") or 0.0)
    if now is not None and now < best - 0.1:
        return (
            f"format was {best:.2f} and is {now:.2f}: judgements lose their tags. Likely --lr is "
            "too high; start again from an earlier checkpoint with a lower one"
        )
    return None


def responses_are_cut_off(rows):
    share = recent(rows, "truncated")
    if share is not None and share > 0.1:
        return (
            f"{share:.0%} of the responses are cut off by --max_new_tokens. Raise it, or see in "
            "rollouts-*.jsonl whether they repeat themselves; then lower --lr"
        )
    return None


def entropy_has_collapsed(rows):
    now, start = recent(rows, "entropy"), mean_of(rows[:RECENT], "entropy")
    if start and now < 0.05 * start:
        return (
            f"entropy was {start:.3g} and is {now:.2g}: all samples are nearly the same, and there "
            "is nothing left to learn from. Take an earlier checkpoint, or a lower --lr"
        )
    return None


def rewards_are_all_equal(rows):
    if len(rows) >= RECENT and all(row["grad_norm"] == 0 for row in rows[-RECENT:]):
        return (
            f"for {RECENT} steps all rewards were equal, so the gradient was 0. The pairs are too "
            "easy or too hard for the model, or the format is never right (see format)"
        )
    return None


def many_are_filtered(rows):
    share = recent(rows, "filtered")
    if share is not None and share > 0.1:
        return (
            f"{share:.0%} of the judgements are dropped by the filter (--sigma). Nearly all "
            "rewards are equal and a few far off: likely the data are too easy"
        )
    return None


def policies_drift_apart(rows):
    compared = [row["mismatch"] for row in rows if row.get("mismatch") is not None]
    if len(compared) > 1 and compared[-1] > 3 * compared[0] and compared[-1] > ROUNDING:
        return (
            f"vLLM and the trainer differed by {compared[0]:.1e} at first, by {compared[-1]:.1e} "
            "now. Likely longer judgements or sharper ones; --tis 2 corrects for it"
        )
    return None


def the_judge_fails(rows):
    before = rows[-RECENT - 1] if len(rows) > RECENT else {"judge_calls": 0, "judge_failed": 0}
    calls = rows[-1]["judge_calls"] - before["judge_calls"]
    failed = rows[-1]["judge_failed"] - before["judge_failed"]
    if calls > 0 and failed / calls > 0.05:
        return (
            f"{failed:.0f} of the last {calls:.0f} questions to the judge got no answer, and earn "
            "nothing. See its server's log; a longer --judge_timeout may help"
        )
    return None


def updates_are_skipped(rows):
    skipped = rows[-1]["skipped"]
    if skipped > 0:
        return (
            f"updates skipped in this step, because a gradient was not finite: {skipped:.0f}. "
            "Three in a row stop the run; likely --lr is too high"
        )
    return None


ALARMS = (
    format_falls,
    responses_are_cut_off,
    entropy_has_collapsed,
    rewards_are_all_equal,
    many_are_filtered,
    policies_drift_apart,
    the_judge_fails,
    updates_are_skipped,
)


def alarms(rows):
    """{name: what is wrong and what to do} after the last of these rows."""
    found = {}
    for alarm in ALARMS:
        message = alarm(rows)
        if message:
            found[alarm.__name__] = message
    return found
