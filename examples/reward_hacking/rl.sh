#!/usr/bin/env bash
# Optimises the tiny world's policy against single reward models, their ensemble, their average, and the gold itself.
#   examples/reward_hacking/rl.sh /tmp/reward_hacking 0 1 2      (after run.sh; about 10 minutes a seed on one core)
# FOLDER/seed-N/rl/ then holds a run for each, FOLDER/seed-0/sweep/ those of other KL coefficients, FOLDER/seed-N/wins/
# win rates against the start by gold, FOLDER/report/ and FOLDER/sweep/ what all of it says. Run again, it goes on.
set -euo pipefail
folder=$1
shift
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

for seed in "$@"; do
  out=$folder/seed-$seed
  members=("$out"/members/members/0[1-6])
  joined=$(IFS=,; echo "${members[*]}")
  rms=()
  for member in "${members[@]}"; do rms+=(--rm "$member"); done
  optimise() { # name, folder, KL coefficient, reward...
    local name=$1 place=$2 coefficient=$3
    shift 3
    echo "== seed $seed: $place" >&2
    warmerge rl --policy "$out/world/sft" "$@" --name "$name" --control "$out/world/gold.py:gold" \
      --prompts "$out/world/prompts.jsonl" --kl-coef "$coefficient" --scale std --steps 200 --batch 128 --answers 4 \
      --lr 3e-4 --max-new-tokens 16 --eos-penalty 1 --micro-batch 128 --control-every 1 --sample-every 50 \
      --keep-every 50 --seed "$seed" --threads 1 -o "$out/$place" > "$out/${place//\//-}.txt"
  }
  mkdir -p "$out/rl"
  if [[ $seed == 0 ]]; then mkdir -p "$out/sweep"; fi
  optimise "average" rl/warm 0.05 --warm "$joined"
  optimise "single" rl/single-1 0.05 --rm "${members[0]}"
  optimise "ensemble" rl/ensemble 0.05 "${rms[@]}" --ensemble mean,scale=std
  optimise "true reward" rl/true 0.05 --rm "$out/world/gold.py:gold"
  optimise "single" rl/single-2 0.05 --rm "${members[1]}"
  optimise "single" rl/single-3 0.05 --rm "${members[2]}"
  if [[ $seed == 0 ]]; then
    for coefficient in 0.01 0.2 0.5; do
      optimise "average" "sweep/warm-$coefficient" "$coefficient" --warm "$joined"
      optimise "single" "sweep/single-$coefficient" "$coefficient" --rm "${members[0]}"
    done
  fi
  policies=()
  for run in warm single-1 single-2 single-3 ensemble true; do
    for step in 50 100 150 200; do policies+=(--policy "$run step $step=$out/rl/$run/step-$step"); done
  done
  if [[ ! -e $out/wins/winrate.json ]]; then
    warmerge winrate "${policies[@]}" --against "start=$out/world/sft" --prompts "$out/world/held-out.jsonl" \
      --judge "$out/world/gold.py:gold" --max-new-tokens 16 --seed "$seed" --threads 1 -o "$out/wins" > "$out/wins.txt"
  fi
done

runs=() wins=()
for seed in "$@"; do
  runs+=("$folder/seed-$seed/rl")
  wins+=(--winrate "$folder/seed-$seed/wins/winrate.json")
done
warmerge rl-report "${runs[@]}" "${wins[@]}" -o "$folder/report" --overwrite
if [[ -d $folder/seed-0/sweep ]]; then
  warmerge rl-report "$folder"/seed-0/rl/{warm,single-1} "$folder/seed-0/sweep" -o "$folder/sweep" --overwrite
fi
