#!/usr/bin/env bash
# Trains an image editor on OpenMoji drawings and shows what it learnt:
#
#   bash launch/quickstart.sh
#
# Tokenizer, semantic encoder and SCAR in turn, then edits of held-out emoji.
# Leaves grid.png, metrics.json and the work directories in OUT. A second run
# picks up where the first one stopped.
#
#   ORDER        which tokens are predicted together: raster (the default),
#                scale or random
#   OUT          where results go    (default: runs/quickstart, with the ORDER
#                and _smoke at its end where given)
#   SMOKE=1      the same path in a few minutes, with models too small to edit
#   ABLATIONS=1  also trains without the source and without the instruction
#   PYTHON VENV  see setup.sh
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
. launch/setup.sh
set_up data

out=${OUT:-runs/quickstart${ORDER:+_$ORDER}${SMOKE:+_smoke}}
switches=${ORDER:+,order=$ORDER}${SMOKE:+,smoke}
config=configs/openmoji.py
mkdir -p "$out"

# stage NAME COMMAND...: runs it unless done; its time counts over all tries.
stage() {
  local name=$1 dir=$out/$1 start=$SECONDS status=0 before
  shift
  mkdir -p "$dir"
  if [ "$(cat "$dir/done" 2>/dev/null)" = "$*" ]; then
    echo "== $name: done before (remove $dir to do it again)"
    return
  fi
  printf '\n== %s: %s\n' "$name" "$*"
  "$@" || status=$?
  before=$(cat "$dir/seconds" 2>/dev/null || echo 0)
  echo $((before + SECONDS - start)) >"$dir/seconds"
  [ $status -eq 0 ] || exit $status
  echo "$*" >"$dir/done"
  echo "== $name took $((SECONDS - start)) s"
}

train() {
  local name=$1 variant=$2
  shift 2
  stage "$name" scar train --config="$config:$variant$switches" \
    --workdir="$out/$name" "$@"
}

# score NAME EXTRA...: scores the model in $out/NAME on the held-out splits.
score() {
  local name=$1
  shift
  stage "eval_$name" scar eval --workdir="$out/$name" \
    --json="$out/eval_$name/scores.json" "$@"
}

parts=(--config.tokenizer.artifact="$out/tokenizer"
  --config.encoder.artifact="$out/encoder")
runs=(edit)

train tokenizer tokenizer
train encoder encoder
train edit edit "${parts[@]}"
score edit --grid="$out/grid.png"
if [ -n "${ABLATIONS:-}" ]; then
  for without in no_source no_text; do
    train "$without" "edit,$without" "${parts[@]}"
    score "$without"
    runs+=("$without")
  done
fi

python launch/summary.py --out="$out" "${runs[@]}"
