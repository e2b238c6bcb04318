#!/usr/bin/env bash
# Trains on GPU nodes of a Slurm cluster, one process for each GPU:
#
#   NODES=4 GPUS=8 CONFIG=configs/x.py:edit WORKDIR=/shared/run \
#     bash launch/slurm.sh
#
# Run it on a login node, in a checkout that the nodes see, with .venv set up
# there (. launch/setup.sh && set_up cuda). The job gets SIGTERM before its time
# is up or when it is preempted, saves, and is queued again until it is done.
#
#   NODES  (default: 1)       GPUS  of a node          (default: 8)
#   CPUS   of a process       (default: 8)
#   TIME   limit of one turn  (default: 24:00:00)
#   GRACE  seconds from SIGTERM to the end             (default: 180)
#   NAME   of the job         (default: scar)
#   LOGS   folder of the log  (default: logs)
#   PARTITION ACCOUNT QOS     as the cluster wants them
#   VENV                      see setup.sh
#   CONFIG WORKDIR ARGS DRY_RUN  see common.sh
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

line=$(train_line)
# 143 is what `scar train` says after it saved upon SIGTERM.
job=". ${VENV:-.venv}/bin/activate
srun --kill-on-bad-exit=1 bash -c $(printf '%q' "$line")
status=\$?
[ \$status -eq 143 ] && exec scontrol requeue \$SLURM_JOB_ID
exit \$status"

run mkdir -p "${LOGS:-logs}"
run sbatch --job-name="${NAME:-scar}" --nodes="${NODES:-1}" \
  --ntasks-per-node="${GPUS:-8}" --gpus-per-node="${GPUS:-8}" \
  --cpus-per-task="${CPUS:-8}" --time="${TIME:-24:00:00}" \
  --signal="TERM@${GRACE:-180}" --requeue --open-mode=append \
  --output="${LOGS:-logs}/%x-%j.log" ${PARTITION:+--partition="$PARTITION"} \
  ${ACCOUNT:+--account="$ACCOUNT"} ${QOS:+--qos="$QOS"} --wrap="$job"
