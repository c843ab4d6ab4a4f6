"""
A trained judge as the scorer of answers in verl or OpenRLHF, where each prompt has a reference
answer: the reward is the share of votes for the answer against the reference. The judge is behind a
server; how to call it, as evaluate.Judge takes it, is set in the environment of the workers (Ray's
runtime_env):

    JUDGE='{"model": "out/rl", "base_url": "http://127.0.0.1:8000/v1", "temperature": 0}'

verl      reward.custom_reward_function.path=recipes/score_with_a_judge.py; its data have the
          reference in reward_model.ground_truth, and `question` and `images`, a list of paths, in
          extra_info
OpenRLHF  --reward.remote_url recipes/score_with_a_judge.py --data.label_key label; a reward
          function sees no pictures there, so a label is all that the judge needs, as JSON text:
          {"question": "...", "images": ["..."], "reference": "..."}

Both are called as by the code that recipes/train_a_judge.py names.
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.files import InputError
from evaluate import Judge
from recipes.train_a_judge import response_of


@functools.cache
def judge():
    if "JUDGE" not in os.environ:
        raise InputError(
            'no JUDGE in the environment; expected JSON such as {"model": "out/rl", "base_url": '
            '"http://127.0.0.1:8000/v1", "temperature": 0}'
        )
    return Judge(**json.loads(os.environ["JUDGE"]))


def share_of_votes(question, images, answer, reference):
    """A judgement without a verdict is half a vote."""
    votes = judge()(question, images, answer, reference).votes
    for_answer, _, for_neither = votes
    return (for_answer + for_neither / 2) / sum(votes)


def compute_score(data_source, solution_str, ground_truth, extra_info):
    """verl's reward of one response, in one of many threads."""
    question, images = extra_info["question"], list(extra_info["images"])
    return share_of_votes(question, images, solution_str, ground_truth)


def reward_func(queries, prompts, labels, **_):
    """OpenRLHF's, of one response at a time, in one of many threads."""
    shares = []
    for query, prompt, label in zip(queries, prompts, labels):
        label = json.loads(label)
        answer = response_of(query, prompt)
        shares.append(
            share_of_votes(label["question"], label["images"], answer, label["reference"])
        )
    rewards = torch.tensor(shares)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}
