#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU slice, from your own machine:
#
#   TPU=my-pod ZONE=us-west4-a TYPE=v5litepod-16 CONFIG=configs/x.py:edit \
#     WORKDIR=gs://my-bucket/run bash launch/tpu_vm.sh create setup train logs
#
# Actions, in the order given:
#   create  asks for the slice as a queued resource and waits for it
#   setup   copies the committed source to all workers and installs it
#   train   starts `scar train` on all workers; it outlives this shell
#   logs    follows what the first worker tells
#   stop    SIGTERM to all workers: they save and end; `train` goes on from there
#   delete  gives the slice back
#
#   TPU      name of the slice          ZONE     where it is
#   PROJECT  (default: gcloud's)        TYPE     accelerator, for `create`
#   RUNTIME  VM image   (default: by TYPE)
#   SPOT=1   a slice that may be preempted
#   CONFIG WORKDIR ARGS DRY_RUN  see common.sh
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

need TPU ZONE
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
tpu=(gcloud compute tpus)

# on WORKER COMMAND: on one worker, or on `all`.
on() {
  run "${tpu[@]}" tpu-vm ssh "$TPU" "${where[@]}" --worker="$1" --command="$2"
}

runtime() {
  case $TYPE in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *)
      echo "TYPE=$TYPE: set RUNTIME to the VM image of this accelerator" >&2
      return 2
      ;;
  esac
}

create() {
  local image state
  need TYPE
  image=${RUNTIME:-$(runtime)} || exit 2
  run "${tpu[@]}" queued-resources create "$TPU" --node-id="$TPU" \
    "${where[@]}" --accelerator-type="$TYPE" --runtime-version="$image" \
    ${SPOT:+--spot}
  while [ -z "${DRY_RUN:-}" ]; do
    state=$("${tpu[@]}" queued-resources describe "$TPU" "${where[@]}" \
      --format='value(state.state)')
    echo "$TPU: $state"
    case $state in
      ACTIVE) break ;;
      FAILED | SUSPENDED) exit 1 ;;
    esac
    sleep 30
  done
}

setup() {
  local archive=${TMPDIR:-/tmp}/scar_jax.tar.gz
  # What is committed, so that the commit in config.json tells what ran.
  run git archive --format=tar.gz --output="$archive" HEAD
  run "${tpu[@]}" tpu-vm scp "$archive" "$TPU:scar_jax.tar.gz" "${where[@]}" \
    --worker=all
  on all 'set -e
sudo apt-get -q update && sudo apt-get -q install -y python3.11-venv
mkdir -p scar_jax && tar -xzf scar_jax.tar.gz -C scar_jax && cd scar_jax
PYTHON=python3.11 && . launch/setup.sh && set_up tpu,gcs,data,text'
}

train() {
  local line
  line=$(train_line)
  on all "cd scar_jax && . .venv/bin/activate
nohup setsid bash -c $(printf '%q' "$line") >train.log 2>&1 &
echo \$! >train.pid"
}

logs() { on 0 'tail -n 100 -F scar_jax/train.log'; }

stop() {
  # `kill` of a program that has ended already is no fault.
  # shellcheck disable=SC2016
  on all 'kill -TERM "$(cat scar_jax/train.pid)" || true'
}

delete() {
  run "${tpu[@]}" queued-resources delete "$TPU" "${where[@]}" --force --quiet
}

[ $# -gt 0 ] || set -- setup train logs
for action in "$@"; do
  case $action in
    create | setup | train | logs | stop | delete) "$action" ;;
    *)
      echo "$action: accepted: create, setup, train, logs, stop, delete" >&2
      exit 2
      ;;
  esac
done
