"""
rl.py where ratios become large, to see what bounds on them are worth. What makes them large is put
in from outside; rl.py has no flag for any of it.

  --update blind     see toy/released.py, whose other flags are here, too
  --sync_every K     vLLM gets the trainer's weights only every K steps: its samples are old
  --sampler_temperature T     vLLM samples at T, and gives log-probabilities of temperature 1
  --algo cispo_batch          CISPO with StableReinforce's advantages, for one sample a prompt

The log has one more share of tokens, `risen`: those that A < 0 pushes down and that have become
more than a thousand times likelier. They are what the pre-clip is for (section 2.1).

With --sampler_temperature 1 they are rare, whatever was learned from other samples. The mean of
pi / pi_old over samples of pi_old is 1, so no more than one token in a thousand can have a ratio
above a thousand (Markov's inequality).

$ python toy/stale.py @toy/rl.args --old_logps vllm --check_every 0 --sync_every 5
$ python toy/stale.py @toy/rl.args --check_every 0 --update blind --train_batch 24
"""

import itertools
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rl
from core import flags, neighbours
from core.files import InputError
from stable_reinforce import per_token, share
from toy import released

MUCH_LIKELIER = math.log(1e3)
start_run, sync = rl.start_run, rl.sync


class HotSampler:
    """A sampler at another temperature. Of all its callers only a rollout wants logps."""

    def __init__(self, sampler, temperature):
        self.sampler = sampler
        self.temperature = temperature

    def generate(self, prompts, seeds, n, temperature, max_tokens, logps):
        if logps:
            temperature = self.temperature
        return self.sampler.generate(prompts, seeds, n, temperature, max_tokens, logps)

    def __getattr__(self, name):
        return getattr(self.sampler, name)


def start_hot_run(args, *others):
    run = start_run(args, *others)
    return replace(run, sampler=HotSampler(run.sampler, args.sampler_temperature))


def sync_now_and_then(steps, every, run):
    if next(steps) % every == 0:
        sync(run)


def count_risen(loss_function, logps, old_logps, advantages, mask, **options):
    """A loss as it is, with the share of risen tokens among its statistics."""
    loss, statistics = loss_function(logps, old_logps, advantages, mask, **options)
    log_ratio, A, tokens = per_token(logps.detach(), old_logps, advantages, mask)
    statistics["risen"] = share((log_ratio > MUCH_LIKELIER) & (A < 0), tokens)
    return loss, statistics


def parser():
    p = released.parser()
    add = p.add_argument_group("large ratios").add_argument
    every_help = "steps from one sync of vLLM to the next"
    add("--sync_every", type=flags.whole(1), default=1, help=every_help)
    temperature_help = "of the rollout; the log-probabilities that vLLM gives are those of 1"
    add("--sampler_temperature", type=flags.above_zero(), default=1.0, help=temperature_help)
    return p


def add_cispo_batch():
    neighbours.ALGORITHMS["cispo_batch"] = replace(
        neighbours.ALGORITHMS["cispo"], advantages=neighbours.standardised_over_batch
    )


def put_in(args):
    lags = args.sync_every > 1 or args.sampler_temperature != 1
    if lags and (args.old_logps != "vllm" or args.check_every):
        raise InputError(
            "--old_logps is that of the trainer or --check_every is not 0: a sampler that lags "
            "behind is another policy; give --old_logps vllm --check_every 0"
        )
    if args.eval_every % args.sync_every or args.steps % args.sync_every:
        raise InputError(
            f"--eval_every {args.eval_every} and --steps {args.steps}: expected multiples of "
            f"--sync_every, {args.sync_every}; else old weights are evaluated"
        )
    released.put_in(args)
    rl.parser = parser
    rl.start_run = start_hot_run
    rl.sync = partial(sync_now_and_then, itertools.count(1), args.sync_every)
    for name, algorithm in neighbours.ALGORITHMS.items():
        counted = partial(count_risen, algorithm.loss)
        neighbours.ALGORITHMS[name] = replace(algorithm, loss=counted)


def main():
    add_cispo_batch()
    put_in(parser().parse_args())
    rl.main()


if __name__ == "__main__":
    flags.run_stage("toy/stale.py", main)
