"""
A judge trained in verl or OpenRLHF: Eq. 2 as these two call a reward. Prompts are Table 1
(core.pairs.JUDGING_PROMPT), the ground truth is the better answer, 1 or 2.

verl      reward.custom_reward_function.path=recipes/train_a_judge.py, with the choice in
          reward_model.ground_truth of its data; called as NaiveRewardManager of
          verl/experimental/reward_loop/reward_manager/naive.py (verl-project/verl at 1dda039) does
OpenRLHF  --reward.remote_url recipes/train_a_judge.py --data.label_key choice; called as
          SingleTurnAgentExecutor of openrlhf/utils/agent.py (OpenRLHF/OpenRLHF at 3c3be62) does

Without more there is no consistency reward. A judge of consistency is set by judge.py's flags, in
the environment of the workers (Ray's runtime_env):

    JUDGE_FLAGS="--judge model --judge_url http://127.0.0.1:8000/v1"

The pre-clip, the filter and the loss stay theirs; stable_reinforce.py has ours, to put in there.
"""

import functools
import os
import re
import shlex
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core import flags
from judge import ConsistencyJudge
from stable_reinforce import final_reward, format_reward, result_reward

END_TOKENS = re.compile(r"(<\|im_end\|>|<\|endoftext\|>)\s*$")  # of Qwen's models


def reward_parts(text, choice):
    """Eq. 2 of a judgement, and what it is made of."""
    result, form = result_reward(text, choice), format_reward(text)
    consistency = 0.0
    if result:  # nothing else is asked about: it does not count
        (answer,) = consistency_judge().consistency([text])
        consistency = float(answer == 1)
    score = final_reward(result, consistency, form)
    return {"score": score, "result": result, "consistency": consistency, "format": form}


@functools.cache
def consistency_judge():
    p = flags.command_line("JUDGE_FLAGS: judge.py's flags")
    ConsistencyJudge.add_flags(p)
    p.set_defaults(judge="none")
    return ConsistencyJudge(p.parse_args(shlex.split(os.environ.get("JUDGE_FLAGS", ""))))


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """verl's reward of one response, in one of many threads; all but the score is logged."""
    return reward_parts(solution_str, int(ground_truth))


def reward_func(queries, prompts, labels, **_):
    """OpenRLHF's, of one response at a time, in one of many threads."""
    parts = []
    for query, prompt, label in zip(queries, prompts, labels):
        parts.append(reward_parts(response_of(query, prompt), int(label)))
    columns = {}
    for name in parts[0]:
        columns[name] = torch.tensor([of_response[name] for of_response in parts])
    return {
        "rewards": columns.pop("score"),
        "scores": columns["result"],  # in [0, 1], for --algo.dynamic_filtering
        "extra_logs": columns,
    }


def response_of(query, prompt):
    """
    What follows the prompt, by its last characters: the rest is not the same in the query, where a
    picture has become many tokens.

    >>> response_of("See <|pad|><|pad|>.\\nassistant\\n1<|im_end|>", "See <|pad|>.\\nassistant\\n")
    '1'
    """
    ending = prompt[-12:]
    *before, response = query.split(ending, prompt.count(ending))
    if len(before) < prompt.count(ending):
        raise ValueError(f"expected a query with its prompt, got {query[-200:]!r}")
    return END_TOKENS.sub("", response)
