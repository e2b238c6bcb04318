# shellcheck shell=bash
# Sourced by the launchers of pods and clusters.
#
#   DRY_RUN=1  prints the commands instead of running them
#   CONFIG     what to train: configs/x.py:variant
#   WORKDIR    where results go; every host must see it: gs://bucket/run, or a
#              folder of a file system that all of them share
#   ARGS       more words for `scar train`: "--config.data.batch=512 ..."

# need NAME...: ends with a message unless each of these variables is set.
need() {
  local variable missing=()
  for variable in "$@"; do
    [ -n "${!variable:-}" ] || missing+=("$variable")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    echo "${0##*/} needs ${missing[*]}; see the comment at its top" >&2
    exit 2
  fi
}

# run COMMAND...: runs it, or prints it as it would be typed.
run() {
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

# The training command as one line for another shell. `exec`, so that signals
# of a scheduler reach the program and not a shell before it.
train_line() {
  local words=()
  need CONFIG WORKDIR
  read -r -a words <<<"${ARGS:-}"
  printf 'exec scar train'
  printf ' %q' --config="$CONFIG" --workdir="$WORKDIR" "${words[@]}"
  printf ' --distributed\n'
}
