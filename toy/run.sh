#!/usr/bin/env bash
# The whole pipeline on the toy world, on two CPU cores, in about 15 minutes; make toy calls it.
# Each command is printed before it runs. Stopped anywhere, the same command continues from there.
set -euo pipefail
source "$(dirname "$0")/servers.sh"
TWO_RANKS="torchrun --standalone --nproc_per_node=2"
mkdir -p $OUT/done

stage() { # name, command...: run it once, and note how many seconds it took
    name=$1
    shift
    if [ -e "$OUT/done/$name" ]; then
        echo "== $name: done before, in $(cat "$OUT/done/$name") s"
        return
    fi
    printf '\n== %s\n$ %s\n' "$name" "$*"
    start=$(date +%s)
    "$@"
    echo $(($(date +%s) - start)) > "$OUT/done/$name"
}

# 1. The world: every training source and benchmark of the paper, in its real schema, from a seed
stage world python toy/sources.py --out $OUT/data --seed 0
serve_stand_in
wait_for 8010

# 2. Annotation: up to three attempts a pair; how many it took is the pair's difficulty
stage annotate python annotate.py @toy/annotate.args

# 3. Cold start from the base model: toy/base is what Qwen2.5-VL-7B-Instruct is to the paper
stage sft $TWO_RANKS sft.py @toy/sft.args

# 4. Reinforcement learning
stage rl $TWO_RANKS rl.py @toy/rl.args --clip 1e3

# 5. Evaluation of the three models: benchmarks and held-out pairs, in both orders
evaluate() { # name, folder, other flags
    name=$1
    model=$2
    shift 2
    stage "evaluate-$name" $TWO_RANKS evaluate.py @toy/evaluate.args --limit 100 \
        --model "$model" --out "$OUT/eval-$name" "$@"
}
evaluate base toy/base --samples 4 # no verdict in any of them
evaluate sft $OUT/sft
evaluate rl $OUT/rl

# 6. What a reward model is for: a careless policy, trained by GRPO with the new reward model,
#    behind vLLM, as its scorer
if [ ! -e $OUT/done/downstream ]; then
    serve_model $OUT/rl 8020
    if [ ! -e $OUT/careless/config.json ]; then
        stage careless python toy/careless.py --out $OUT/careless
    fi
    wait_for 8020
fi
stage downstream python downstream_grpo.py @toy/downstream.args

# 7. One table, the pictures, the seconds
python toy/report.py --out $OUT
