#!/usr/bin/env bash
# R1-Reward, all of it, on two CPU cores: the real scripts on the toy world, about twelve minutes. Called by `make toy`.
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
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
up() { # port: wait until a server answers there
    python - "$1" <<'PY'
import sys, time, urllib.request
for _ in range(600):
    try:
        sys.exit(urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=5).status != 200)
    except OSError:
        time.sleep(0.5)
sys.exit(f"nothing answers on port {sys.argv[1]}")
PY
}
up 8010

# 2. Annotation: up to three attempts a pair; how many it took is its difficulty
stage annotate python annotate.py @toy/annotate.args

# 3. Cold start from the base model (toy/base plays Qwen2.5-VL-7B-Instruct), 4. reinforcement learning
[ ! -e $OUT/sft/tokenizer_config.json ] || [ -e $OUT/done/sft ] || echo 0 > $OUT/done/sft  # killed just after its last file
stage sft $TWO sft.py @toy/sft.args
stage rl $TWO rl.py @toy/rl.args --clip 1e3

# 5. Evaluation before and after: three benchmarks and the held-out pairs, both answer orders
for model in base sft rl; do
    folder=$OUT/$model; [ $model = base ] && folder=toy/base
    stage evaluate-$model python evaluate.py @toy/evaluate.args --limit 100 --model $folder --out $OUT/eval-$model
done

# 6. What a reward model is for: a careless policy, trained by GRPO with the new reward model, behind vLLM, as its scorer
if [ ! -e $OUT/done/downstream ]; then
    VLLM_CPU_KVCACHE_SPACE=1 python -m vllm.entrypoints.openai.api_server --model $OUT/rl --dtype float32 --enforce-eager \
        --max-model-len 1024 --host 127.0.0.1 --port 8020 > $OUT/reward-model.log 2>&1 &
    [ -e $OUT/careless/config.json ] || stage careless python toy/careless.py --out $OUT/careless
    up 8020
fi
stage downstream python downstream_grpo.py @toy/downstream.args

# 7. One table, the pictures, the times
python toy/report.py --out $OUT
