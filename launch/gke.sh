#!/usr/bin/env bash
# Trains on a GKE cluster of TPUs through XPK (pip install xpk):
#
#   NAME=edit-1 CLUSTER=my-cluster ZONE=us-west4-a TYPE=v5litepod-256 \
#     IMAGE=us-docker.pkg.dev/my-project/my-repo/scar:1 \
#     CONFIG=configs/x.py:edit WORKDIR=gs://my-bucket/run \
#     bash launch/gke.sh image train
#
# Actions, in the order given:
#   image   builds launch/Dockerfile and pushes it as IMAGE
#   train   starts the workload; again with the same WORKDIR it goes on there
#   list    workloads of the cluster
#   stop    deletes the workload; it saves first, if GRACE is long enough
#
#   NAME     of the workload            CLUSTER ZONE  where it runs
#   PROJECT  (default: gcloud's)        TYPE          TPU type of a slice
#   SLICES   how many slices (default: 1); with more, add
#            --config.mesh.replica=N to ARGS
#   IMAGE    name and tag of the image, with its registry
#   GRACE    seconds between SIGTERM and the end       (default: 120)
#   RESTARTS after a preemption or a fault             (default: 100)
#   XPK      more words for `xpk workload create`
#   CONFIG WORKDIR ARGS DRY_RUN  see common.sh
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

need NAME CLUSTER ZONE
where=(--cluster="$CLUSTER" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"})

image() {
  need IMAGE
  run docker build --file=launch/Dockerfile --tag="$IMAGE" .
  run docker push "$IMAGE"
}

train() {
  local more=() line
  need IMAGE TYPE
  line=$(train_line)
  read -r -a more <<<"${XPK:-}"
  run xpk workload create --workload="$NAME" "${where[@]}" \
    --tpu-type="$TYPE" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
    --max-restarts="${RESTARTS:-100}" \
    --termination-grace-period-seconds="${GRACE:-120}" "${more[@]}" \
    --command="$line"
}

list() { run xpk workload list "${where[@]}"; }
stop() { run xpk workload delete --workload="$NAME" "${where[@]}"; }

[ $# -gt 0 ] || set -- train
for action in "$@"; do
  case $action in
    image | train | list | stop) "$action" ;;
    *)
      echo "$action: accepted: image, train, list, stop" >&2
      exit 2
      ;;
  esac
done
