#!/usr/bin/env bash
# The toy runs behind results/, on two cores, two at a time, one rank and one thread each. After `make toy`, whose annotations, cold start
# and reward model they take. Killed, it goes on where it stood. Reported on the test split, which chose no setting.
#   toy/ablations.sh              all of it, about two hours
#   toy/ablations.sh seeds        three seeds, and the consistency weight (Table 7)
#   toy/ablations.sh harsh        StableReinforce against no pre-clip and no filter where training breaks (Fig. 2), five seeds
#   toy/ablations.sh saturated    the filter on and off where nearly every judgement is right, five seeds
#   toy/ablations.sh judges       how good the consistency judge is, and how much it weighs (Table 13), three seeds
#   toy/ablations.sh heads        the three kinds of reward model (Table 5)
#   toy/ablations.sh downstream   a policy trained by the reward model and by a coin (Table 11), three seeds
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
OUT=out/toy
PARTS=${*:-seeds harsh saturated judges heads downstream}
export OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
python toy/server.py --key $OUT/data/key.jsonl --port 8010 > $OUT/server.log 2>&1 &
sleep 3

two() { # lines of: file that is there when it is done, command...; run two at a time
    xargs -P 2 -L 1 bash -c '
        done=$1; shift; folder=$(dirname "$done")
        [ -e "$done" ] && exit 0
        echo "\$ python $*"; mkdir -p "$folder"
        # a run that its gradients stop is a result too
        python "$@" > "$folder/screen.txt" 2>&1 || echo "$folder: $(tail -n 1 "$folder/screen.txt")"' two
}

seeds() {
    for seed in 0 1 2; do for weight in 0.5 0; do
        folder=$OUT/seeds/weight$weight-$seed
        echo "$folder/curves.png rl.py @toy/rl.args $TEST --seed $seed --consistency_weight $weight --out $folder"
    done; done | two
    python toy/compare.py "consistency weight 0.5=$OUT/seeds/weight0.5-" "weight 0=$OUT/seeds/weight0-" --out results/toy_rl
}

harsh() { # 32 updates on each rollout, no bound on the gradient's norm
    for seed in 0 1 2 3 4; do for kind in stable plain; do
        folder=$OUT/harsh/$kind-$seed
        [ $kind = stable ] && safe= || safe="--clip 0 --sigma 0"
        echo "$folder/curves.png rl.py @toy/rl.args $TEST --seed $seed --lr 1e-3 --train_batch 24 --epochs 4 --clip_grad 1e9 --steps 6 $safe --out $folder"
    done; done | two
    python toy/compare.py "StableReinforce=$OUT/harsh/stable-" "no pre-clip, no filter=$OUT/harsh/plain-" --out results/toy_harsh
}

saturated() { # the trained model goes on, three times as fast, on questions that it answers rightly in 96 of 100
    grep '"question": "What colour' $OUT/annotate/pairs.jsonl > $OUT/annotate/colours.jsonl
    for seed in 0 1 2 3 4; do for sigma in 3 0; do
        folder=$OUT/saturated/sigma$sigma-$seed
        echo "$folder/curves.png rl.py @toy/rl.args $TEST --model $OUT/rl --data $OUT/annotate/colours.jsonl --lr 1e-3 --steps 10" \
             "--seed $seed --sigma $sigma --out $folder"
    done; done | two
    python toy/compare.py "filter=$OUT/saturated/sigma3-" "no filter=$OUT/saturated/sigma0-" --out results/toy_saturated
}

serve() { # a model's folder, a port: a real vLLM server on loopback
    VLLM_CPU_KVCACHE_SPACE=1 python -m vllm.entrypoints.openai.api_server --model "$1" --dtype float32 --enforce-eager \
        --max-model-len 1024 --host 127.0.0.1 --port "$2" > "$OUT/server-$2.log" 2>&1 &
    until python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$2/health')" 2>/dev/null; do sleep 1; done
}

judges() { # toy/base for Qwen2.5-VL-7B, toy/weaker.py for the 3B
    [ -e $OUT/weaker/config.json ] || python toy/weaker.py --out $OUT/weaker
    serve toy/base 8021
    serve $OUT/weaker 8022
    base="--judge_url http://127.0.0.1:8021/v1 --judge_model toy/base"
    for seed in 0 1 2; do
        while read -r name flags; do
            echo "$OUT/judges/$name-$seed/curves.png rl.py @toy/rl.args $TEST --seed $seed $flags --out $OUT/judges/$name-$seed"
        done <<END
base $base
weaker --judge_url http://127.0.0.1:8022/v1 --judge_model $OUT/weaker
noisy $base --judge_noise 0.25
noisy_quarter $base --judge_noise 0.25 --consistency_weight 0.25
random --judge random
END
    done | two
    python toy/compare.py "toy/base=$OUT/judges/base-" "weaker=$OUT/judges/weaker-" "toy/base, 25 % flipped=$OUT/judges/noisy-" \
        "the same, weight 0.25=$OUT/judges/noisy_quarter-" "a coin=$OUT/judges/random-" "none: weight 0=$OUT/seeds/weight0-" --out results/toy_judges
}

heads() {
    python annotate.py @toy/annotate.args --mode critique
    { echo "$OUT/scalar/config.json sft.py @toy/sft.args --head scalar --lr 1.5e-3 --out $OUT/scalar"
      echo "$OUT/critic/config.json sft.py @toy/sft.args --head critic --lr 1.5e-3 --data $OUT/annotate/critic.jsonl --out $OUT/critic"; } | two
    for model in scalar critic sft rl; do
        echo "$OUT/heads/$model/table.md evaluate.py --model $OUT/$model --bench pairs=$OUT/data/test/pairs.jsonl --limit 600 --group family" \
             "--temperature 0 --max_new_tokens 128 --context 1024 --page 0 --out $OUT/heads/$model"
    done | two
    for model in scalar critic sft rl; do cat $OUT/heads/$model/table.md; echo; done > results/toy_heads.md
    grep -E '^# |^\| one sample' results/toy_heads.md
}

downstream() {
    python toy/sources.py --out $OUT/held --seed 1  # other pictures
    serve $OUT/rl 8020
    for seed in 0 1 2; do for judge in model random; do
        folder=$OUT/grpo/$judge-$seed
        echo "$folder/curves.png downstream_grpo.py @toy/downstream.args --eval_data $OUT/held/tasks/train.jsonl --eval_n 300 --eval_every 25" \
             "--judge $judge --seed $seed --out $folder"
    done; done | two
    for judge in model random; do for seed in 0 1 2; do
        echo "$judge $seed: $(grep -oE '"eval_(greedy|sampled|win)": [0-9.]+' $OUT/grpo/$judge-$seed/log.jsonl | tr -d '"' | paste -sd' ')"
    done; done | tee results/downstream.txt
}

TEST="--eval_data $OUT/data/test/pairs.jsonl --eval_n 600 --check_every 0"
for part in $PARTS; do $part; done
