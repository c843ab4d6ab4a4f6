#!/usr/bin/env bash
# The toy runs behind results/: seeds, the consistency weight (Table 7), and StableReinforce against Reinforce++ under harsh settings (Fig. 2).
# After `make toy` (it needs its annotations and its cold start): toy/ablations.sh; about an hour on two cores, two runs at a time, one rank
# each. Killed, it goes on where it stood. Reported on the test split, which chose no setting.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
OUT=out/toy
export OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
python toy/server.py --key $OUT/data/key.jsonl --port 8010 > $OUT/server.log 2>&1 &
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
sleep 3

COMMON="@toy/rl.args --eval_data $OUT/data/test/pairs.jsonl --eval_n 600 --eval_every 10 --check_every 0"
HARSH="--lr 1e-3 --train_batch 24 --epochs 4 --clip_grad 1e9 --steps 10"  # 32 updates on each rollout, no bound on the gradient
runs() {
    for seed in 0 1 2; do
        echo "$OUT/seeds/weight0.5-$seed --seed $seed"
        echo "$OUT/seeds/weight0-$seed --seed $seed --consistency_weight 0"
    done
    for seed in 0 1 2 3 4; do
        echo "$OUT/harsh/stable-$seed --seed $seed $HARSH"
        echo "$OUT/harsh/plain-$seed --seed $seed $HARSH --clip 0 --sigma 0"  # Reinforce++ with KL 0: neither pre-clip nor filter
    done
}
one() { # folder, flags...
    folder=$1; shift
    if [ -e "$folder/curves.png" ]; then return; fi
    echo "\$ python rl.py $COMMON --out $folder $*"
    mkdir -p "$folder"
    # a run that its gradients stop is a result too: compare.py reads what it logged
    python rl.py $COMMON --out "$folder" "$@" > "$folder/screen.txt" 2>&1 || echo "$folder: $(tail -n 1 "$folder/screen.txt")"
}
export -f one
export COMMON
runs | xargs -P 2 -L 1 bash -c 'one "$@"' one

python toy/compare.py "consistency weight 0.5=$OUT/seeds/weight0.5-" "weight 0=$OUT/seeds/weight0-" --out results/toy_rl
python toy/compare.py "StableReinforce=$OUT/harsh/stable-" "no pre-clip, no filter=$OUT/harsh/plain-" --out results/toy_harsh
