"""What the six scripts say to a command line that they do not take: a line each."""

import pytest
from bad_input import cases, check

# scripts | words | what the one line says, without "argument --FLAG: " before expected or invalid
# all: the six; train: sft, rl and downstream_grpo
FLAGS = """
# --- whole numbers
annotate      | --others -1              | expected a whole number, 0 or more, got '-1'
annotate      | --others many            | expected a whole number, 0 or more, got 'many'
annotate      | --limit 0                | expected a whole number, 1 or more, got '0'
annotate      | --limit 1e3              | expected a whole number, 1 or more, got '1e3'
annotate      | --max_tokens 0           | expected a whole number, 1 or more, got '0'
annotate      | --max_pixels 0           | expected a whole number, 1 or more, got '0'
annotate      | --max_frames 0           | expected a whole number, 1 or more, got '0'
annotate      | --concurrency 0          | expected a whole number from 1 to 10000
annotate      | --concurrency 2.5        | expected a whole number from 1 to 10000
annotate      | --retries -1             | expected a whole number, 0 or more, got '-1'
all           | --seed -1                | expected a whole number from 0 to 4294967295
all           | --seed x                 | expected a whole number from 0 to 4294967295
annotate rl evaluate | --seed 5000000000        | expected a whole number from 0 to 4294967295
train         | --context 0              | expected a whole number, 1 or more
sft rl evaluate downstream | --context -1             | expected a whole number, 1 or more
train         | --max_new_tokens 0       | expected a whole number, 1 or more
train         | --max_new_tokens x       | expected a whole number, 1 or more
train         | --micro_tokens 0         | expected a whole number, 1 or more
train         | --micro_tokens inf       | expected a whole number, 1 or more
train         | --min_pixels 0           | expected a whole number, 1 or more
train         | --max_pixels -5          | expected a whole number, 1 or more
train         | --workers -1             | expected a whole number from 0 to 1000
sft rl        | --workers 1001           | expected a whole number from 0 to 1000
train         | --save_every -1          | expected a whole number, 0 or more
train         | --epochs 0               | expected a whole number from 1 to 1000
train         | --zero 4                 | expected a whole number from 0 to 3
sft rl        | --zero -1                | expected a whole number from 0 to 3
train         | --epochs 1001            | expected a whole number from 1 to 1000
rl downstream | --steps 1000001          | expected a whole number from 0 to 1000000
rl evaluate   | --samples 10001          | expected a whole number from 1 to 10000
sft           | --batch 0                | expected a whole number, 1 or more, got '0'
sft           | --batch nan              | expected a whole number, 1 or more, got 'nan'
sft           | --eval_every 0           | expected a whole number, 1 or more, got '0'
sft           | --eval_n -1              | expected a whole number, 0 or more, got '-1'
rl downstream | --rollout_batch 0        | expected a whole number, 1 or more
rl downstream | --train_batch 0          | expected a whole number, 1 or more
rl downstream | --train_batch 12.5       | expected a whole number, 1 or more
rl evaluate downstream | --samples 0              | expected a whole number from 1 to 10000
rl downstream | --samples -8             | expected a whole number from 1 to 10000
rl evaluate downstream | --tensor_parallel 0      | expected
rl downstream | --steps -1               | expected a whole number from 0 to 1000000
rl downstream | --warmup -5              | expected a whole number, 0 or more
rl downstream | --warmup 0.03            | expected a whole number, 0 or more
rl downstream | --eval_n 0               | expected a whole number, 1 or more
rl downstream | --eval_n -1              | expected a whole number, 1 or more
rl downstream | --eval_every -1          | expected a whole number, 0 or more
rl downstream | --check_every -1         | expected a whole number, 0 or more
rl judge downstream | --judge_concurrency 0    | expected a whole number from 1 to 10000
rl judge downstream | --judge_retries -1       | expected a whole number
evaluate      | --limit 0                | expected a whole number, 1 or more, got '0'
evaluate      | --limit all              | expected a whole number, 1 or more, got 'all'
evaluate      | --concurrency 0          | expected a whole number from 1 to 10000
evaluate      | --max_new_tokens 0       | expected a whole number, 1 or more
evaluate      | --max_pixels 0           | expected a whole number, 1 or more, got '0'
evaluate      | --page -1                | expected a whole number, 0 or more, got '-1'
downstream    | --chunk 0                | expected a whole number, 1 or more, got '0'
downstream    | --judge_tokens 0         | expected a whole number, 1 or more

# --- numbers
annotate evaluate | --temperature -1         | expected a number, 0 or more, got '-1'
annotate evaluate | --temperature nan        | expected a number, 0 or more, got 'nan'
annotate      | --timeout 0              | expected a number from 0.1 to 86400
annotate      | --timeout inf            | expected a number from 0.1 to 86400
annotate evaluate | --price -1 2         | expected a number, 0 or more, got '-1'
evaluate      | --price 1 2              | --price is for a server; give its --base_url
annotate      | --price 1                | expected 2 arguments
annotate evaluate | --price nan 0        | expected a number, 0 or more, got 'nan'
train         | --lr 0                   | expected a number above 0, got '0'
train         | --lr nan                 | expected a number above 0, got 'nan'
train         | --lr inf                 | expected a number above 0, got 'inf'
train         | --lr fast                | expected a number above 0, got 'fast'
train         | --clip_grad nan          | expected a number, 0 or more
train         | --clip_grad -1           | expected a number, 0 or more
sft           | --warmup -0.1            | expected a number from 0 to 1, got '-0.1'
sft           | --warmup 100             | expected a number from 0 to 1, got '100'
sft           | --weight_decay -1        | expected a number, 0 or more, got '-1'
sft           | --weight_decay nan       | expected a number, 0 or more, got 'nan'
rl downstream | --passes 0               | expected a number above 0 and at most 1000
rl downstream | --passes nan             | expected a number above 0 and at most 1000
rl downstream | --memory 5               | expected a number above 0 and at most 1
rl downstream | --memory 0               | expected a number above 0 and at most 1
rl downstream | --clip nan               | expected a number, 0 or more, got 'nan'
rl downstream | --clip -1                | expected a number, 0 or more, got '-1'
rl downstream | --clip 0.5               | --clip is 0.5; expected a number above 1, or 0
rl downstream | --clip 1                 | --clip is 1; expected a number above 1, or 0
rl downstream | --sigma -1               | expected a number, 0 or more, got '-1'
rl downstream | --sigma nan              | expected a number, 0 or more, got 'nan'
rl downstream | --eps nan                | expected a number from 0 to 1, got 'nan'
rl downstream | --eps 1.5                | expected a number from 0 to 1, got '1.5'
rl downstream | --eps_high -1            | expected a number, 0 or more, got '-1'
rl downstream | --kl_coef nan            | expected a number, 0 or more, got 'nan'
rl downstream | --kl_coef -0.1           | expected a number, 0 or more
rl downstream | --tis -1                 | expected a number, 0 or more, got '-1'
rl downstream | --tis inf                | expected a number, 0 or more, got 'inf'
rl            | --consistency_weight -9  | expected a number, 0 or more
rl            | --consistency_weight nan | expected a number, 0 or more
rl            | --order_bonus -1         | expected a number, 0 or more
rl judge downstream | --judge_noise 1.5        | expected a number from 0 to 1
rl judge downstream | --judge_noise nan        | expected a number from 0 to 1
rl judge downstream | --judge_timeout 0        | expected a number from 0.1 to 86400
rl judge downstream | --judge_patience -1      | expected a number, 0 or more
rl judge downstream | --judge_patience inf     | expected a number, 0 or more
downstream    | --exact_weight -1        | expected a number, 0 or more

# --- words
annotate      | --mode both              | invalid choice: 'both' (choose from
annotate      | --request [1]            | expected a JSON object such as
annotate      | --request '{'            | expected a JSON object such as
sft           | --schedule slow          | invalid choice: 'slow' (choose from
sft           | --head critics           | invalid choice: 'critics' (choose from
train         | --attn fast              | invalid choice: 'fast' (choose from
train         | --tracker mlflow         | invalid choice: 'mlflow' (choose from
rl downstream | --algo ppo2              | invalid choice: 'ppo2' (choose from
rl downstream | --engine sglang          | invalid choice: 'sglang' (choose from
rl downstream | --kl k4                  | invalid choice: 'k4' (choose from
rl downstream | --old_logps none         | invalid choice: 'none' (choose from
rl            | --reward_form Eq2        | invalid choice: 'Eq2' (choose from
rl judge downstream | --judge human            | invalid choice: 'human' (choose from
evaluate      | --parse loose            | invalid choice: 'loose' (choose from
evaluate      | --orders chosen          | invalid choice: 'chosen' (choose from
downstream    | --verdict maybe          | invalid choice: 'maybe' (choose from
downstream    | --pairs 0                | expected all, ring, or how far apart
downstream    | --pairs some             | expected all, ring, or how far apart

# --- names that are no flags, and values that are not there
annotate      | --concurency 4           | unknown flag --concurency; perhaps --concurrency is meant
sft           | --learning_rate 1        | unknown flag --learning_rate
sft           | --batch_size 8           | unknown flag --batch_size; perhaps --batch is meant
rl            | --eval 5                 | unknown flag --eval; perhaps --eval_n is meant
rl            | --clip_gradient 1        | unknown flag --clip_gradient; perhaps --clip_grad is
judge         | --url http://x           | unknown flag --url; perhaps --judge_url is meant
judge         | --judge-url http://x     | unknown flag --judge-url; perhaps --judge_url is meant
evaluate      | --benches x              | unknown flag --benches; perhaps --bench is meant
evaluate      | --score                  | unknown flag --score; perhaps --scores is meant
downstream    | --chunks 3               | unknown flag --chunks; perhaps --chunk is meant
sft rl judge  | more                     | unrecognized arguments: more
sft rl judge  | --data                   | expected one argument
sft rl judge evaluate downstream | --out ''                 | expected a value, got an empty one
annotate downstream | --data ''                | expected
annotate rl evaluate | --model ''               | expected a value, got an empty one

# --- names of data sets
annotate      | --data LLaVA=x           | expected NAME=PATH or NAME=hub:owner/name@revision
annotate      | --data RLAIF-V           | got 'RLAIF-V'
annotate      | --data RLAIF-V=          | got 'RLAIF-V='
annotate      | --data =x                | got '=x'
evaluate      | --bench VLRewardBench=x  | expected NAME=PATH with a NAME of
evaluate      | --bench VL-RewardBench   | got 'VL-RewardBench'
evaluate      | --bench pairs=           | got 'pairs='
downstream    | --data MathVista=x.jsonl | MathVista=x.jsonl

# --- servers
annotate      | --base_url localhost:8000 | expected an address such as http://127.0.0.1:8000/v1
annotate      | --base_url file:///etc/hosts | expected an address such as http://127.0.0.1:8000/v1
annotate      | --base_url http://       | expected an address such as http://127.0.0.1:8000/v1
annotate      | --base_url http://me:word@a/v1 | expected an address without user, password
annotate      | --base_url http://a/v1?key=word | expected an address without user
annotate      | --base_url http://a.example/v1 | OPENAI_API_KEY is not set
evaluate      | --base_url ftp://a/v1    | expected an address such as http://127.0.0.1:8000/v1
evaluate      | --base_url http://a:99999/v1 | expected an address such as http://127.0.0.1:8000/v1
evaluate      | --base_url http://a.example/v1 | OPENAI_API_KEY is not set
rl judge downstream | --judge_url 127.0.0.1 | expected an address such as http://127.0.0.1:8000/v1
rl judge downstream | --judge_url http://x:word@a/v1 | expected an address without user, password
judge         | --judge_url http://[::1  | expected an address such as http://127.0.0.1:8000/v1
judge         | --judge_url http://a:0/v1 | expected an address such as http://127.0.0.1:8000/v1
judge         | --judge model --judge_url http://a.example/v1 | OPENAI_API_KEY is not set, and

# --- flags that cannot go together
sft rl        | --min_pixels 500 --max_pixels 400 | --min_pixels is 500; expected at most
rl downstream | --max_new_tokens 512 --context 512 | --max_new_tokens is 512; expected less than
rl            | --rollout_batch 10 --train_batch 4 | --train_batch is 4; expected a divisor of
rl            | --tensor_parallel 2      | --tensor_parallel is 2; expected a divisor of
rl            | --rollout_batch 3 --train_batch 1 --both_orders | --rollout_batch is 3; expected
rl            | --algo topr --tis 2      | --tis weighs single tokens, but --algo topr
rl            | --algo grpo --eps_high 0.3 | --eps_high has no meaning for --algo grpo
rl            | --engine hf --zero 2 --tis 2 | --engine hf has none, use --engine vllm
rl            | --engine hf --zero 2 --check | --engine hf has none, use --engine vllm
rl            | --engine hf --zero 2 --old_logps vllm | --engine hf has none, use --engine vllm
rl            | --engine hf --zero 3     | use --zero 0, 1 or 2
rl            | --save_best              | --save_best needs --eval_data
rl            | --algo grpo              | --samples is 1; --algo grpo compares the responses to a
downstream    | --samples 1 --train_batch 2 | --samples is 1; --algo grpo compares the
evaluate      | --samples 3              | --samples 3: expected an even number with --orders both
evaluate      | --temperature 0 --samples 4 | --samples 4: at --temperature 0 all samples of an
evaluate      | --bench pairs=a pairs=b  | --bench pairs is given twice; a run takes one file of it
evaluate      | --parse lenient --scores x | --prompt and --parse lenient are of texts, and a
evaluate      | --ab x --page 0          | --page 0 leaves no row for the page of --ab
evaluate      | --score_only             | --score_only takes the rows of the run in --out; leave
evaluate      | --judgements x --prompt r1_reward | --prompt is of no use: the file of
evaluate      | --judgements x --samples 4 | --samples is of no use: the file of --judgements says
evaluate      | --judgements x --scores y | --scores and --judgements both say
evaluate      | --scores scores.jsonl --base_url http://127.0.0.1:9/v1 | --scores and --base_url
evaluate      | --answers a b            | --answers belongs to one question; give its --question
evaluate      | --json                   | --json belongs to one question; give its --question

# --- flags in a file
all           | @gone.args               | @gone.args cannot be read: No such
sft rl        | @folder                  | @folder cannot be read: Is a directory
sft rl        | @quote.args              | @quote.args, line 2: No closing quotation
rl evaluate   | @binary.args             | @binary.args: expected a text file of flags, and this
rl judge      | @loop.args               | @loop.args: the file includes itself
sft           | @typo.args               | unknown flag --bacth; perhaps --batch is meant
sft           | @bounds.args             | argument --batch: expected a whole number, 1 or more
"""

# flags that a script cannot do without, and those of one question, which does without --out
REQUIRED = """
annotate      | --out x                  | the following arguments are required: --data
sft           | --data x                 | the following arguments are required: --out
sft           | --out x                  | the following arguments are required: --data
rl            | --out x                  | out/annotate/rl.jsonl: no such file; expected a JSONL
judge         | --out x                  | the following arguments are required: --data
evaluate      | --model x                | the following arguments are required: --out
downstream    | --out x                  | the following arguments are required: --data
evaluate      | --question Q             | --question needs two --answers or more, got 0
evaluate      | --question Q --answers a | --question needs two --answers or more, got 1
evaluate      | --question Q --answers a b --out x | --out is for rows in files; leave it out, or
evaluate      | --question Q --answers a b --score_only | --score_only is for rows in files
evaluate      | --question Q --answers a b --samples 3 | --samples 3: expected an even number
evaluate      | --question Q --answers a b --images gone.png | --images gone.png: missing image
evaluate      | --question Q --answers a b --images typo.args | --images typo.args: unreadable
"""


@pytest.mark.parametrize("script, words, message", cases(FLAGS))
def test_a_command_line_that_is_not_taken_is_one_line(bad_stage, script, words, message):
    check(bad_stage(script, words), script, message)


@pytest.mark.parametrize("script, words, message", cases(REQUIRED))
def test_a_flag_that_is_missing_is_one_line(bad_stage, script, words, message):
    check(bad_stage(script, words, complete=False), script, message)
