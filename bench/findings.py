"""What the checks of bench/ share: a line for each thing they found out, which others can read."""

import re
import sys
from dataclasses import dataclass

OK, SLOW, NO_GPU, FAILED = "ok", "slow", "needs a GPU", "FAILED"
LINE = re.compile(rf"^({OK}|{SLOW}|{NO_GPU}|{FAILED}): (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    verdict: str
    text: str

    def __str__(self):
        return f"{self.verdict}: {self.text}"


def expect(condition, text):
    return Finding(OK if condition else FAILED, text)


def attempt(name, check):
    """What check() found about `name`. A check that raises is a finding, too."""
    try:
        return check()
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        return Finding(FAILED, f"{name}: {type(error).__name__}: {first_line}")


def read_findings(log):
    return [Finding(*match) for match in LINE.findall(log)]


def print_and_exit(findings):
    """A line each; exit code 1 if one of them failed."""
    for finding in findings:
        print(finding, flush=True)
    sys.exit(int(any(finding.verdict == FAILED for finding in findings)))
