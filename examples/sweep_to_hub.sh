#!/usr/bin/env bash
# From a model and preference pairs to a published average: train a sweep, check it, choose members, measure, push.
#   BASE=my-sft PAIRS=pairs.jsonl CHOOSE_ON=select.jsonl REPORT_ON=test.jsonl examples/sweep_to_hub.sh
#   PUSH=me/warm-rm BASE=my-sft ... examples/sweep_to_hub.sh     # also publishes it; without, only says what it would send
# CHOOSE_ON and REPORT_ON are two files with prompts of their own: members that were chosen on a set look too good on it.
# Run again, it goes on where it stopped.
set -euo pipefail

BASE=${BASE:-my-sft}                  # a language model (after SFT), an encoder or a reward model: a folder or a Hub id
PAIRS=${PAIRS:-pairs.jsonl}           # rows with prompt, chosen, rejected
CHOOSE_ON=${CHOOSE_ON:-select.jsonl}
REPORT_ON=${REPORT_ON:-test.jsonl}
OUT=${OUT:-sweep}
RUNS=${RUNS:-6}
LR=${LR:-1e-5,4e-5,1e-4}              # the paper's; ten times lower for models of several 10^9 parameters
DROPOUT=${DROPOUT:-0.05,0.1}
EPOCHS=${EPOCHS:-1}
BATCH=${BATCH:-128}
MAX_LENGTH=${MAX_LENGTH:-1024}        # tokens; longer texts are cut, and counted
SELECT=${SELECT:-greedy}              # or best:3
POINTS=${POINTS:-11}                  # of each curve
LICENSE=${LICENSE:-}                  # such as apache-2.0; a base that states one needs none here
PUSH=${PUSH:-}

echo "== train $RUNS members"
warmerge train --base "$BASE" --data "$PAIRS" --val select="$CHOOSE_ON" --runs "$RUNS" --lr "$LR" --dropout "$DROPOUT" \
  --epochs "$EPOCHS" --batch "$BATCH" --max-length "$MAX_LENGTH" -o "$OUT/runs"

echo "== may they be merged, and how far apart are they?"
warmerge inspect "$OUT"/runs/members/* --distances --base "$OUT/runs/init" --figure "$OUT/angles.png"

echo "== choose ($SELECT) and average"
warmerge average "$OUT"/runs/members/* --select "$SELECT" --data select="$CHOOSE_ON" --max-length "$MAX_LENGTH" \
  -o "$OUT/warm" --overwrite
mapfile -t chosen < <(python3 -c 'import json, sys
for entry in json.load(open(sys.argv[1]))["inputs"]: print(entry["checkpoint"])' "$OUT/warm/warmerge.json")
echo "chosen: ${chosen[*]}"
if ((${#chosen[@]} < 2)); then
  echo "one member is better alone than with any other: there is nothing to average" >&2
  exit 1
fi

echo "== is the way from each of them to the average flat?"
warmerge lmc-curve "${chosen[@]}" --path mean --points "$POINTS" --data test="$REPORT_ON" --max-length "$MAX_LENGTH" \
  -o "$OUT/lmc" --overwrite

echo "== is it better than its members, their ensemble, and plain shrinkage?"
warmerge eval "${chosen[@]}" --init "$OUT/runs/init" --data test="$REPORT_ON" --max-length "$MAX_LENGTH" \
  -o "$OUT/eval" --overwrite

how=(--yes)
if [[ -z $PUSH ]]; then how=(--dry-run); fi
echo "== push ${how[*]}"
warmerge push "$OUT/warm" "${PUSH:-me/warm-rm}" --results "$OUT/eval" --results "$OUT/lmc" \
  ${LICENSE:+--license "$LICENSE"} "${how[@]}"
