"""
rl.py with parts of the authors' released code (github.com/yfzhang114/r1_reward, commit 3693413) in
their place, to see what each of them does. They are put in from outside: rl.py has no flag for any.

  --update blind      old log-probabilities and updates do not see the pictures, and count positions
                      in one dimension; the rollout and a KL penalty's reference see them
  --bounds released   a judgement is dropped if its standardised advantage is further than 3 from
                      the mean of the REWARDS, or further than 10 from 0
  --rewards released  reasoning that does not lead to a right verdict takes away half of its reward,
                      where Eq. 2 adds nothing

Not here: the released verifier, which gives 1 for an exception; nothing raises one on the toy.

$ python toy/released.py @toy/rl.args --update blind --bounds released --check_every 0
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rl
from core import training
from core.encoding import VISION_INPUTS
from core.files import InputError
from core.flags import run_stage
from core.policy import Policy, token_logps

PICTURES = (*VISION_INPUTS, "image_index", "video_index", "mm_token_type_ids")
parser_of_rl = rl.parser


def blind_token_logps(policy, batch, entropy=False):
    """As token_logps. A reference sees; what is trained has DeepSpeed's engine around it."""
    if not isinstance(policy, Policy):
        batch = {name: batch[name] for name in batch if name not in PICTURES}
    return token_logps(policy, batch, entropy)


def set_released_advantages(samples, rewards, args):
    """As rl.set_advantages, with mean and standard deviation over the tokens of the batch."""
    rewards = rewards.double()
    lengths = torch.tensor([len(sample.response_ids) for sample in samples]).double()
    sums = torch.stack([lengths.sum(), (lengths * rewards).sum()])
    tokens, total = rl.sum_over_ranks(sums)
    mean = total / tokens
    squares = (lengths * (rewards - mean).square()).sum()
    variance = rl.sum_over_ranks(squares[None]) / tokens
    standardised = (rewards - mean) / variance.clamp_min(1e-8).sqrt()
    kept = ((standardised - mean).abs() <= 3) & (standardised.abs() <= 10)
    advantages = torch.where(kept, standardised, 0.0).float()
    for sample, advantage in zip(samples, advantages):
        sample.advantages = advantage.expand(len(sample.response_ids))
    return kept


def released_rewards(parts, args):
    """As rl.total_rewards: consistency counts 1 or -1, and 0 where the judge was not asked."""
    consistency = (2 * parts["consistency"] - 1).nan_to_num()
    right = parts["result"] * (1 + args.consistency_weight * consistency)
    return right + 0.5 * parts["format"]


def parser():
    p = parser_of_rl()
    add = p.add_argument_group("the released code").add_argument
    add("--update", choices=("sighted", "blind"), default="sighted", help="see the top of the file")
    add("--bounds", choices=("paper", "released"), default="paper", help="of the advantages")
    add("--rewards", choices=("paper", "released"), default="paper", help="Eq. 2, or the released")
    return p


def put_in(args):
    """Put the released parts into rl.py, as the flags say."""
    if args.update == "blind":
        if args.check_every:
            raise InputError(
                "--update blind: vLLM sees the pictures and the update does not, so the two cannot "
                "be compared; give --check_every 0"
            )
        rl.token_logps = blind_token_logps
        training.token_logps = blind_token_logps
    if args.bounds == "released":
        rl.set_advantages = set_released_advantages
    if args.rewards == "released":
        rl.total_rewards = released_rewards
    rl.parser = parser  # so that the flags are a part of the run's settings


def main():
    put_in(parser().parse_args())
    rl.main()


if __name__ == "__main__":
    run_stage("toy/released.py", main)
