#!/usr/bin/env bash
# Makes the tiny world, its reward models, their average, and measures them: run.sh FOLDER SEED...
#   examples/reward_hacking/run.sh /tmp/reward_hacking 0 1 2      (6 to 18 minutes a seed, as busy as the machine is)
# FOLDER/seed-N/ then holds world/, members/, warm/, eval/ and bon/. Run again, it goes on.
set -euo pipefail
folder=$1
shift
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

for seed in "$@"; do
  out=$folder/seed-$seed world=$folder/seed-$seed/world members=$folder/seed-$seed/members
  mkdir -p "$out"
  step() { # name, command...: runs it, unless it was finished before, and notes its seconds
    local name=$1 begun=$SECONDS
    shift
    if [[ -e $out/.$name.done ]]; then return; fi
    echo "== seed $seed: $name" >&2
    "$@"
    echo "$name $((SECONDS - begun))" >> "$out/seconds.txt"
    touch "$out/.$name.done"
  }
  rms=() names=""
  for i in 1 2 3 4 5 6; do
    rms+=(--rm "m$i=$members/members/0$i")
    names+=,m$i
  done

  [[ -e $out/.world.done ]] || rm -rf "$world"
  step world python -m warmerge.demo.world "$world" --seed "$seed"
  # Baklava: each member starts from one of three checkpoints of one fine-tuning. One label in four is swapped.
  step members warmerge train --init "$world/sft-201" --init "$world/sft-249" --init "$world/sft" \
    --data "$world/train.jsonl" --corrupt 0.25 --corrupt-seed "$seed" --runs 6 --epochs 6 --batch 64 \
    --lr 7.5e-4,1.5e-3,3e-3 --dropout 0,0.1 --seed "$((100 * seed))" --threads 1 \
    --val val="$world/val.jsonl" --val ood="$world/ood.jsonl" -o "$members"
  step warm warmerge average "$members"/members/0[1-6] -o "$out/warm" --threads 1
  step eval warmerge eval "$members"/members/0[1-6] --init "$members/init-3" --data val="$world/val.jsonl" \
    --data ood="$world/ood.jsonl" --data train="$world/train.jsonl" --mask "$members/corruption.json" \
    --threads 1 -o "$out/eval"
  step bon warmerge bon --policy "$world/sft" --prompts "$world/held-out.jsonl" -n 64 --max-new-tokens 16 \
    --control "$world/gold.py:gold" --seed "$seed" "${rms[@]}" --ensemble "ens=${names#,}" \
    --ensemble "ens-std=${names#,},scale=std" --warm "warm=${names#,}" --reference warm --threads 1 -o "$out/bon"
done
