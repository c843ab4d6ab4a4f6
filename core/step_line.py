"""A step of a run in one line of at most 110 columns: short numbers, seconds, the time left."""

import math


def short(number):
    """
    A number in at most five characters, so that the columns of a run stand below each other.

    >>> [short(number) for number in (None, 192, 0.98, 1.4142, 61.23, 4096.4, 123456.7, 0.00012)]
    ['-', '192', '0.980', '1.41', '61.2', '4096', '1e+05', '1e-04']
    """
    if number is None:
        return "-"
    size = abs(number)
    if isinstance(number, int) or math.isinf(number):
        return str(number)
    if size >= 1e5 or 0 < size < 0.0005:
        return f"{number:.0e}"
    if size >= 100:
        return f"{number:.0f}"
    if size >= 10:
        return f"{number:.1f}"
    return f"{number:.3f}" if 0 <= number < 1 else f"{number:.2f}"


def duration(seconds):
    """
    >>> [duration(seconds) for seconds in (42, 68, 754, 4_000, 40_000, 400_000)]
    ['42s', '1m08s', '12m', '1h06m', '11h', '4d15h']
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02d}h"
    if hours >= 10:
        return f"{hours}h"
    if hours:
        return f"{hours}h{minute:02d}m"
    if minutes >= 10:
        return f"{minutes}m"
    return f"{minutes}m{second:02d}s" if minutes else f"{second}s"


NAMES = {  # where the log's key would not do
    "result": "right",
    "exact": "right",
    "consistency": "consistent",
    "norm": "grad norm",
    "n": "of",
}


def name_of(key):
    """
    >>> [name_of(key) for key in ("grad_norm", "result", "eval_greedy", "val_n")]
    ['grad norm', 'right', 'greedy', 'of']
    """
    plain = key.removeprefix("eval_").removeprefix("val_")
    return NAMES.get(plain, plain.replace("_", " "))


def step_line(step, steps, row, keys, seconds_left):
    parts = [head(step, steps)]
    parts += [f"{name_of(key)} {short(row.get(key)):>5}" for key in keys]
    parts += [f"{short(row['seconds']):>4}s", f"left {duration(seconds_left)}"]
    return "  ".join(parts)


def held_out_line(step, steps, row, keys):
    """Of the keys those that this model has: a scalar head, for example, has no format."""
    parts = [f"{head(step, steps)}  held out"]
    parts += [f"{name_of(key)} {short(row[key])}" for key in keys if key in row]
    return "  ".join(parts)


def head(step, steps):
    return f"step {step:>{len(str(steps))}}/{steps}"
