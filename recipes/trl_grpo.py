"""
TRL's GRPOTrainer with a judge as its reward: the answers to a prompt are compared with each other,
and an answer's reward is the share of its duels that it wins (C.9; downstream_grpo.py does the same
with this project's own trainer).

For another TRL script, duels_won is enough: give it a judge with functools.partial, and the data
set the columns `question` and `picture` (a path). All answers to a prompt must be on one process:
make per_device_train_batch_size a multiple of num_generations.

TRL comes in an environment of its own, and this script is run with its Python. The judge is behind
a server, here the toy's; tasks are JSON lines with question, answer and image:

$ python bench/step.py --setup_trl out/trl/.venv
$ VLLM_CPU_KVCACHE_SPACE=1 python -m vllm.entrypoints.openai.api_server --model out/toy/rl \\
    --dtype float32 --enforce-eager --max-model-len 1024 --host 127.0.0.1 --port 8020
$ . out/trl/.venv/bin/activate
$ python recipes/trl_grpo.py --model out/toy/careless --data out/toy/data/tasks/train.jsonl \\
    --judge_url http://127.0.0.1:8020/v1 --judge_model out/toy/rl --judge_tokens 100 \\
    --prompts 16 --answers 4 --max_new_tokens 16 --lr 3e-4 --out out/toy/trl
"""

import functools
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core import flags, pictures
from core.files import InputError
from evaluate import Judge
from sources import own_tasks, reading

PROMPTS_AT_ONCE = 8  # whose duels the judge is asked about


# --------------------------------------------------------------------------------------------------
# The reward


def duels_won(completions, question, picture, judge, **_):
    """A reward function of TRL: for each answer, the share of its duels that it won."""
    groups = group_by_prompt(completions, question, picture)
    with ThreadPoolExecutor(PROMPTS_AT_ONCE) as pool:
        shares = pool.map(functools.partial(shares_of_prompt, judge), groups)
        return list(itertools.chain.from_iterable(shares))


def group_by_prompt(completions, question, picture):
    """[(question, picture), answers] of each prompt, whose answers follow each other."""
    groups = []
    for turns, *prompt in zip(completions, question, picture):
        if not groups or groups[-1][0] != prompt:
            groups.append((prompt, []))
        groups[-1][1].append(turns[0]["content"])
    return groups


def shares_of_prompt(judge, group):
    (question, picture), answers = group
    if len(answers) == 1:
        raise InputError(
            "an answer is alone on its process and has no duels; expected all answers to a prompt: "
            "make per_device_train_batch_size a multiple of num_generations"
        )
    shares = dict(judge.rank(question, [picture], answers))
    return [shares[index] for index in range(len(answers))]


# --------------------------------------------------------------------------------------------------
# An example with pictures


def read_rows(args):
    """The rows of TRL's data set: the policy is shown the image, the judge its file, picture."""
    tasks = []
    for where, task in reading.read_records(own_tasks, args.data):
        if isinstance(task, reading.Dropped) or len(task.images) != 1 or not task.images[0]:
            raise InputError(f"{where}: expected one image; fix its path, or leave this row out")
        tasks.append(task)
    pictures.check_may_be_sent(tasks, [args.data], args)
    rows = []
    for task in tasks:
        (path,) = task.images
        prompt = [{"role": "user", "content": task.question}]
        rows.append({"prompt": prompt, "image": path, "question": task.question, "picture": path})
    return rows


def train(args):
    import torch
    from datasets import Dataset, Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import GRPOConfig, GRPOTrainer

    from core.sampler import forbidden_token_ids

    judge = Judge(
        args.judge_model,
        base_url=args.judge_url,
        temperature=0,
        max_new_tokens=args.judge_tokens,
    )
    on_gpu = torch.cuda.is_available()
    processor = AutoProcessor.from_pretrained(args.model, padding_side="left")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype)
    # a marker of a picture, sampled as a word, has no pixels behind it
    forbidden = forbidden_token_ids(processor, model.config.get_text_config().vocab_size)
    config = GRPOConfig(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.prompts * args.answers,
        num_generations=args.answers,
        max_completion_length=args.max_new_tokens,
        generation_kwargs={"suppress_tokens": forbidden},
        learning_rate=args.lr,
        seed=args.seed,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        dataloader_pin_memory=on_gpu,
        logging_steps=1,
        log_multimodal=False,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=functools.partial(duels_won, judge=judge),
        args=config,
        train_dataset=Dataset.from_list(read_rows(args)).cast_column("image", Image()),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model(args.out)
    trainer.save_state()


def parser():
    p = flags.command_line(__doc__)
    add = p.add_argument
    add("--model", required=True, help="folder or hub name of the policy")
    add("--data", required=True, help="tasks, JSON lines with question, answer and image")
    add("--out", required=True, help="folder for the trained policy and trainer_state.json")
    url_help = "OpenAI-compatible server of the judge"
    add("--judge_url", type=flags.server_url, required=True, help=url_help)
    add("--judge_model", required=True, help="the judge's name there")
    add("--judge_tokens", type=flags.whole(1), default=4096, help="of a judgement")
    pictures.add_media_root_flag(add)
    add("--steps", type=flags.whole(1), default=100, help="updates")
    add("--prompts", type=flags.whole(1), default=8, help="a step, on each process")
    add("--answers", type=flags.whole(2), default=8, help="to each prompt")
    add("--max_new_tokens", type=flags.whole(1), default=512, help="of an answer")
    add("--lr", type=flags.above_zero(), default=1e-6, help="learning rate")
    add("--seed", type=flags.random_seed, default=0, help="of the samples")
    return p


def main():
    train(parser().parse_args())


if __name__ == "__main__":
    flags.run_stage("trl_grpo.py", main, if_stopped="it begins again from the start")
