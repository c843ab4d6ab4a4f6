#!/usr/bin/env bash
# The toy runs behind results/, on two cores: two at a time, one rank and one thread each. Run it
# after make toy, whose annotations, cold start and reward model it uses. Stopped anywhere, the same
# command continues from there. Everything is reported on the test split, which chose no setting.
#   toy/ablations.sh              all of it, about four hours
#   toy/ablations.sh seeds        three seeds, and the consistency weight (Table 7)
#   toy/ablations.sh harsh        StableReinforce against no pre-clip and no filter where training
#                                 breaks (Fig. 2), five seeds
#   toy/ablations.sh saturated    the filter on and off where nearly every judgement is right, five
#                                 seeds
#   toy/ablations.sh judges       how good the consistency judge is, and its weight (Table 13),
#                                 three seeds
#   toy/ablations.sh heads        the three kinds of reward model (Table 5)
#   toy/ablations.sh released     what the authors' released code does in place of ours: update, filter,
#                                 pre-clip; twelve settings, three seeds, about two hours
#   toy/ablations.sh downstream   a policy trained by the reward model and by a coin (Table 11),
#                                 three seeds
set -euo pipefail
source "$(dirname "$0")/servers.sh"
PARTS=${*:-seeds harsh saturated judges heads downstream released}
ON_TEST="--eval_data $OUT/data/test/pairs.jsonl --eval_n 600 --check_every 0"

two_at_a_time() { # reads lines: a file that exists when the run is done, python's arguments
    xargs -P 2 -L 1 bash -c '
        done=$1; shift; folder=$(dirname "$done")
        [ -e "$done" ] && exit 0
        echo "\$ python $*"; mkdir -p "$folder"
        # a run that stops because of its gradients is a result too
        python "$@" > "$folder/screen.txt" 2>&1 ||
            echo "$folder: $(tail -n 1 "$folder/screen.txt")"' two_at_a_time
}

rl() { # folder, flags...: a line for two_at_a_time
    folder=$1
    shift
    echo "$folder/curves.png rl.py @toy/rl.args $ON_TEST $* --out $folder"
}

seeds() {
    for seed in 0 1 2; do
        for weight in 0.5 0; do
            rl $OUT/seeds/weight$weight-$seed --seed $seed --consistency_weight $weight
        done
    done | two_at_a_time
    python toy/compare.py "consistency weight 0.5=$OUT/seeds/weight0.5-" \
        "weight 0=$OUT/seeds/weight0-" --out results/toy_rl
}

harsh() { # 32 updates on each rollout, no bound on the gradient's norm
    flags="--lr 1e-3 --train_batch 24 --epochs 4 --clip_grad 1e9 --steps 6"
    for seed in 0 1 2 3 4; do
        rl $OUT/harsh/stable-$seed --seed $seed $flags
        rl $OUT/harsh/plain-$seed --seed $seed $flags --clip 0 --sigma 0
    done | two_at_a_time
    python toy/compare.py "StableReinforce=$OUT/harsh/stable-" \
        "no pre-clip, no filter=$OUT/harsh/plain-" --out results/toy_harsh
}

saturated() { # the trained model goes on, three times as fast, where 96 of 100 answers are right
    colours=$OUT/annotate/colours.jsonl
    grep '"question": "What colour' $OUT/annotate/pairs.jsonl > $colours
    for seed in 0 1 2 3 4; do
        for sigma in 3 0; do
            rl $OUT/saturated/sigma$sigma-$seed --model $OUT/rl --data $colours --lr 1e-3 \
                --steps 10 --seed $seed --sigma $sigma
        done
    done | two_at_a_time
    python toy/compare.py "filter=$OUT/saturated/sigma3-" "no filter=$OUT/saturated/sigma0-" \
        --out results/toy_saturated
}

judges() { # toy/base is the 7B judge, toy/weaker.py makes the 3B one
    [ -e $OUT/weaker/config.json ] || python toy/weaker.py --out $OUT/weaker
    serve_model toy/base 8021
    serve_model $OUT/weaker 8022
    wait_for 8021
    wait_for 8022
    base="--judge_url http://127.0.0.1:8021/v1 --judge_model toy/base"
    weaker="--judge_url http://127.0.0.1:8022/v1 --judge_model $OUT/weaker"
    for seed in 0 1 2; do
        rl $OUT/judges/base-$seed --seed $seed $base
        rl $OUT/judges/weaker-$seed --seed $seed $weaker
        rl $OUT/judges/noisy-$seed --seed $seed $base --judge_noise 0.25
        rl $OUT/judges/noisy_quarter-$seed --seed $seed $base --judge_noise 0.25 \
            --consistency_weight 0.25
        rl $OUT/judges/random-$seed --seed $seed --judge random
    done | two_at_a_time
    python toy/compare.py "toy/base=$OUT/judges/base-" "weaker=$OUT/judges/weaker-" \
        "toy/base, 25 % flipped=$OUT/judges/noisy-" \
        "the same, weight 0.25=$OUT/judges/noisy_quarter-" "a coin=$OUT/judges/random-" \
        "none: weight 0=$OUT/seeds/weight0-" --out results/toy_judges
}

released() {
    declare -A bounds=(
        [paper]="--bounds paper" [released]="--bounds released" [none]="--sigma 0"
    )
    for seed in 0 1 2; do
        for update in sighted blind; do
            for filter in paper released none; do
                for clip in 1e3 0; do
                    folder=$OUT/released/$update-$filter-$clip-$seed
                    echo "$folder/curves.png toy/released.py @toy/rl.args $ON_TEST" \
                        "--update $update ${bounds[$filter]} --clip $clip --seed $seed --out $folder"
                done
            done
        done
    done | two_at_a_time
    python toy/released_report.py --runs $OUT/released --out results/released_code
}

heads() {
    python annotate.py @toy/annotate.args --mode critique
    for head in scalar critic; do
        [ $head = scalar ] && data= || data="--data $OUT/annotate/critic.jsonl"
        folder=$OUT/$head
        echo "$folder/config.json sft.py @toy/sft.args --head $head --lr 1.5e-3 $data --out $folder"
    done | two_at_a_time
    flags="--bench pairs=$OUT/data/test/pairs.jsonl --limit 600 --group family --temperature 0"
    flags="$flags --max_new_tokens 128 --context 1024 --page 0"
    for model in scalar critic sft rl; do
        folder=$OUT/heads/$model
        echo "$folder/table.md evaluate.py --model $OUT/$model $flags --out $folder"
    done | two_at_a_time
    for model in scalar critic sft rl; do
        cat $OUT/heads/$model/table.md
        echo
    done > results/toy_heads.md
    grep -E '^# |^\| one sample' results/toy_heads.md
}

downstream() {
    python toy/sources.py --out $OUT/held --seed 1 # other pictures
    serve_model $OUT/rl 8020
    wait_for 8020
    flags="--eval_data $OUT/held/tasks/train.jsonl --eval_n 300 --eval_every 25"
    for seed in 0 1 2; do
        for judge in model random; do
            folder=$OUT/grpo/$judge-$seed
            echo "$folder/curves.png downstream_grpo.py @toy/downstream.args $flags" \
                "--judge $judge --seed $seed --out $folder"
        done
    done | two_at_a_time
    for judge in model random; do
        for seed in 0 1 2; do
            log=$OUT/grpo/$judge-$seed/log.jsonl
            numbers=$(grep -oE '"eval_(greedy|sampled|win)": [0-9.]+' $log)
            echo "$judge $seed: $(tr -d '"' <<< "$numbers" | paste -sd' ')"
        done
    done | tee results/downstream.txt
}

serve_stand_in
wait_for 8010
for part in $PARTS; do $part; done
