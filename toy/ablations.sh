#!/usr/bin/env bash
# The toy runs behind results/, on two cores: two at a time, one rank and one thread each. Run it
# after make toy, whose annotations, cold start and reward model it uses. Stopped anywhere, the same
# command continues from there. Everything is reported on the test split, which chose no setting.
# make results runs all of it; toy/ablations.sh PART... runs some parts, in this order:
#
#   released     three safeguards, on and off, and what the authors' released code has in their
#                place (Tables 5 and 6, Fig. 2 and 4, results/released_code.md)
#   weights      weight and form of the consistency reward (Table 7)
#   pipeline     the benchmarks with three seeds of training (Tables 3, 4, 8, 12, Fig. 1 and 3)
#   heads        the other kinds of reward model (Table 5)
#   annotators   one that errs more often (Table 10)
#   downstream   a policy trained by the reward model and by a coin (Table 11)
#   judges       how good the consistency judge is, and its weight (Table 13)
#   saturated    the filter where nearly every judgement is right (255 to 1, section 2.1)
#   harsh        no safeguards where training breaks (Fig. 2)
#   room         what a plain fine-tuning on careful judgements reaches without RL
#   stale        the pre-clip where ratios are large, and other bounds on a token's loss
set -euo pipefail
source "$(dirname "$0")/servers.sh"
# minutes of each part on two cores: released and pipeline as measured, the others estimated
declare -A MINUTES=(
    [released]=65 [weights]=45 [pipeline]=20 [heads]=30 [annotators]=30 [downstream]=25
    [judges]=150 [saturated]=20 [harsh]=20 [room]=5 [stale]=35
)
ALL="released weights pipeline heads annotators downstream judges saturated harsh room stale"
PARTS=${*:-$ALL}
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

released_runs() { # clip: a line for each update, filter and seed
    declare -A bounds=(
        [paper]="--bounds paper" [released]="--bounds released" [none]="--sigma 0"
    )
    for seed in 0 1 2; do
        for update in sighted blind; do
            for filter in paper released none; do
                folder=$OUT/released/$update-$filter-$1-$seed
                echo "$folder/curves.png toy/released.py @toy/rl.args $ON_TEST" \
                    "--update $update ${bounds[$filter]} --clip $1 --seed $seed --out $folder"
            done
        done
    done
}

released() { # a run with a pre-clip that never acts is the run without one: see toy/same_runs.py
    released_runs 0 | two_at_a_time
    python toy/same_runs.py $OUT/released/*-0-[0-9]
    released_runs 1e3 | two_at_a_time
    python toy/released_report.py --runs $OUT/released --out results/released_code
    runs=$OUT/released/sighted
    python toy/compare.py "StableReinforce=$runs-paper-1e3-" "no filter=$runs-none-1e3-" \
        "no pre-clip=$runs-paper-0-" "Reinforce++=$runs-none-0-" --out results/toy_safeguards
}

weights() { # the weight of the paper, 0.5, is among the runs of `released`
    for seed in 0 1 2; do
        for weight in 0 0.1 1; do
            rl $OUT/weights/$weight-$seed --seed $seed --consistency_weight $weight
        done
        rl $OUT/weights/external-$seed --seed $seed --reward_form external
    done | two_at_a_time
    paper=$OUT/released/sighted-paper-1e3-
    python toy/compare.py "weight 0.5=$paper" "weight 0=$OUT/weights/0-" --out results/toy_rl
    python toy/compare.py "1=$OUT/weights/1-" "0.5=$paper" "0.1=$OUT/weights/0.1-" \
        "external=$OUT/weights/external-" "0=$OUT/weights/0-" --out results/toy_weights
}

pipeline() { # seed 0 is make toy
    folder=$OUT/pipeline
    for seed in 1 2; do
        sft=$folder/sft-$seed
        echo "$sft/config.json sft.py @toy/sft.args --seed $seed --out $sft"
    done | two_at_a_time
    for seed in 1 2; do
        rl=$folder/rl-$seed
        echo "$rl/config.json rl.py @toy/rl.args --model $folder/sft-$seed --seed $seed --out $rl"
    done | two_at_a_time
    for model in sft rl; do
        for seed in 1 2; do
            out=$folder/eval-$model-$seed
            echo "$out/table.md evaluate.py @toy/evaluate.args --limit 100" \
                "--model $folder/$model-$seed --seed $seed --out $out"
        done
    done | two_at_a_time
    ln -sfn ../eval-sft $folder/eval-sft-0
    ln -sfn ../eval-rl $folder/eval-rl-0
    python toy/seeds_report.py "cold start=$folder/eval-sft-" "StableReinforce=$folder/eval-rl-" \
        --out results/toy_pipeline.md
}

heads() { # what they learn from: the same pairs
    [ -e $OUT/annotate/critic.jsonl ] || python annotate.py @toy/annotate.args --mode critique
    for seed in 0 1 2; do
        for head in scalar critic; do
            [ $head = scalar ] && data= || data="--data $OUT/annotate/critic.jsonl"
            folder=$OUT/heads/$head-$seed
            echo "$folder/config.json sft.py @toy/sft.args --head $head --lr 1.5e-3 $data" \
                "--seed $seed --out $folder"
        done
    done | two_at_a_time
    flags="--bench pairs=$OUT/data/test/pairs.jsonl --limit 600 --group family --temperature 0"
    flags="$flags --max_new_tokens 128 --context 1024 --page 0"
    for seed in 0 1 2; do
        for model in heads/scalar-$seed heads/critic-$seed released/sighted-paper-1e3-$seed; do
            folder=$OUT/heads/eval-$(basename $model)
            echo "$folder/table.md evaluate.py --model $OUT/$model $flags --out $folder"
        done
    done | two_at_a_time
    folder=$OUT/heads/eval-sft-0
    echo "$folder/table.md evaluate.py --model $OUT/sft $flags --out $folder" | two_at_a_time
    python toy/seeds_report.py "scalar head=$OUT/heads/eval-scalar-" \
        "critic and head=$OUT/heads/eval-critic-" "reasoning, cold start=$OUT/heads/eval-sft-" \
        "reasoning, StableReinforce=$OUT/heads/eval-sighted-paper-1e3-" --out results/toy_heads.md
}

annotators() { # the usual one is right in 95 % (easy) to 45 % (hard) at the first attempt
    folder=$OUT/annotators
    for seed in 0 1 2; do
        python toy/server.py --key $OUT/data/key.jsonl --port 8012 --seed $seed \
            --right_easy 0.7 --right_hard 0.3 > $OUT/server-8012.log 2>&1 &
        server=$!
        wait_for 8012
        [ -e $folder/data-$seed/report.md ] || python annotate.py @toy/annotate.args \
            --base_url http://127.0.0.1:8012/v1 --out $folder/data-$seed > /dev/null
        kill $server
    done
    for seed in 0 1 2; do
        for annotator in usual weaker; do
            data=$OUT/annotate
            [ $annotator = usual ] || data=$folder/data-$seed
            out=$folder/$annotator-$seed
            echo "$out/config.json sft.py @toy/sft.args --data $data/sft.jsonl --seed $seed --out $out"
        done
    done | two_at_a_time
    for seed in 0 1 2; do
        for annotator in usual weaker; do
            out=$folder/eval-$annotator-$seed
            echo "$out/table.md evaluate.py @toy/evaluate.args --limit 100" \
                "--model $folder/$annotator-$seed --seed $seed --out $out"
        done
    done | two_at_a_time
    python toy/seeds_report.py "usual annotator=$folder/eval-usual-" \
        "weaker annotator=$folder/eval-weaker-" --out results/toy_annotators.md
}

downstream() {
    python toy/sources.py --out $OUT/held --seed 1 # other pictures
    serve_model $OUT/rl 8020
    wait_for 8020
    flags="--eval_data $OUT/held/tasks/train.jsonl --eval_n 300 --eval_every 0"
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
    python toy/coin.py --data $OUT/held/tasks/train.jsonl --before $OUT/careless \
        --after $OUT/grpo/random-0 $OUT/grpo/model-0 --out results/toy_coin.md
}

judges() { # toy/base is the 7B judge, toy/weaker.py makes the 3B one
    [ -e $OUT/weaker/config.json ] || python toy/weaker.py --out $OUT/weaker
    serve_model toy/base 8021
    serve_model $OUT/weaker 8022
    wait_for 8021
    wait_for 8022
    declare -A flags=(
        [base]="--judge_url http://127.0.0.1:8021/v1 --judge_model toy/base"
        [weaker]="--judge_url http://127.0.0.1:8022/v1 --judge_model $OUT/weaker"
        [noisy]="--judge_url http://127.0.0.1:8021/v1 --judge_model toy/base --judge_noise 0.25"
        [random]="--judge random"
    )
    settings=()
    for judge in base weaker noisy random; do
        for weight in 0.5 0.25 1; do
            settings+=("$judge, weight $weight=$OUT/judges/$judge-$weight-")
        done
    done
    for seed in 0 1 2; do
        for judge in base weaker noisy random; do
            for weight in 0.5 0.25 1; do
                rl $OUT/judges/$judge-$weight-$seed --seed $seed ${flags[$judge]} \
                    --consistency_weight $weight
            done
        done
    done | two_at_a_time
    python toy/compare.py "${settings[@]}" "weight 0=$OUT/weights/0-" --out results/toy_judges
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

harsh() { # 32 updates on each rollout, no bound on the gradient's norm
    flags="--lr 1e-3 --train_batch 24 --epochs 4 --clip_grad 1e9 --steps 6"
    for seed in 0 1 2 3 4; do
        rl $OUT/harsh/stable-$seed --seed $seed $flags
        rl $OUT/harsh/plain-$seed --seed $seed $flags --clip 0 --sigma 0
    done | two_at_a_time
    python toy/compare.py "StableReinforce=$OUT/harsh/stable-" \
        "no pre-clip, no filter=$OUT/harsh/plain-" --out results/toy_harsh
}

room() {
    OMP_NUM_THREADS=2 python toy/room.py --model toy/base --steps 350 --lr 3e-3 --n 600 |
        tee results/toy_room.txt
}

stale() { # a blind update, eight times a rollout, makes ratios large
    flags="--update blind --train_batch 24 --steps 10"
    declare -A losses=(
        [stable]="--algo stable_reinforce" [none]="--algo reinforce++" [dual_clip]="--algo dual_clip"
        [cpgd]="--algo cpgd" [cispo]="--algo cispo_batch"
    )
    settings=()
    for loss in stable none dual_clip cpgd cispo; do
        settings+=("$loss=$OUT/stale/$loss-")
    done
    for seed in 0 1 2 3 4; do
        for loss in stable none dual_clip cpgd cispo; do
            folder=$OUT/stale/$loss-$seed
            echo "$folder/curves.png toy/stale.py @toy/rl.args $ON_TEST $flags ${losses[$loss]}" \
                "--seed $seed --out $folder"
        done
    done | two_at_a_time
    python toy/compare.py "${settings[@]}" --out results/toy_stale
}

echo "minutes on two cores, and what is done of it stays done:"
for part in $PARTS; do printf '  %-12s %4s\n' $part "${MINUTES[$part]:?no such part}"; done
serve_stand_in
wait_for 8010
for part in $PARTS; do $part; done
