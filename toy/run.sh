#!/usr/bin/env bash
# R1-Reward, all of it, on two CPU cores: the real scripts on the toy world, about ten minutes. Called by `make toy`.
# Each command is shown before it runs. Killed anywhere, the same command goes on where it stood; done, it says so.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
OUT=out/toy                                       # the presets toy/*.args name it too
export OMP_NUM_THREADS=1                          # two ranks on two cores; a second thread each only gets in the way
export TRANSFORMERS_VERBOSITY=error VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
TWO="torchrun --standalone --nproc_per_node=2"
mkdir -p $OUT/done

stage() { # name, command...: run it once, remember how long it took
    name=$1; shift
    if [ -e "$OUT/done/$name" ]; then echo "== $name: done before, in $(cat "$OUT/done/$name") s"; return; fi
    echo; echo "== $name"; echo "\$ $*"
    start=$(date +%s); "$@"
    echo $(( $(date +%s) - start )) > "$OUT/done/$name"
}

# 1. The world: every training source and benchmark of the paper, in its real schema, drawn from a seed
stage world python toy/sources.py --out $OUT/data --seed 0

# The stand-in for GPT-4o and for the consistency judge: rules behind a real HTTP server, no model
python toy/server.py --key $OUT/data/key.jsonl --port 8010 > $OUT/server.log 2>&1 &
trap 'kill %1 2>/dev/null || true' EXIT
for _ in $(seq 100); do curl -s http://127.0.0.1:8010/health > /dev/null 2>&1 && break; sleep 0.2; done 2>/dev/null || sleep 10

# 2. Annotation: up to three attempts a pair; how many it took is its difficulty
stage annotate python annotate.py @toy/annotate.args

# 3. Cold start from the base model (toy/base plays Qwen2.5-VL-7B-Instruct), 4. reinforcement learning
stage sft $TWO sft.py @toy/sft.args
stage rl $TWO rl.py @toy/rl.args --clip 1e3

# 5. Evaluation before and after: three benchmarks and the held-out pairs, both answer orders
for model in base sft rl; do
    folder=$OUT/$model; [ $model = base ] && folder=toy/base
    stage evaluate-$model python evaluate.py @toy/evaluate.args --limit 100 --model $folder --out $OUT/eval-$model
done

# 6. One table, the pictures, the times
python toy/report.py --out $OUT
