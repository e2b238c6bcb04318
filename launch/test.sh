#!/usr/bin/env bash
# Every check of the project: bash launch/test.sh [pytest arguments]
#
# Makes .venv with the `test` extra if needed (see setup.sh for PYTHON, VENV).
# WORKERS test processes (default: 2).
# All checks run even if one fails; the exit code is 0 only if all passed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=launch/setup.sh
. launch/setup.sh
set_up test || exit 1

export JAX_PLATFORMS=cpu
failed=()
summary=()

check() {
  local name=$1 start=$SECONDS result=ok
  shift
  printf '\n== %s\n' "$name"
  "$@" || { result=FAILED && failed+=("$name"); }
  summary+=("$(printf '%-12s %-7s %4d s' "$name" "$result" $((SECONDS - start)))")
}

# A folder that is not there yet is nothing to check.
sources=(setup.py)
for folder in scar_jax tests configs launch; do
  [ -d "$folder" ] && sources+=("$folder")
done

check lint ruff check "${sources[@]}"
check format ruff format --check "${sources[@]}"
check imports lint-imports --no-cache
check types pyright
check spelling codespell "${sources[@]}" README.md CONTRIBUTING.md CHANGELOG.md
check shell shellcheck -x launch/*.sh .ci/run
check length bash launch/file_length.sh
check tests python -m pytest -n "${WORKERS:-2}" "$@"

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
if [ ${#failed[@]} -gt 0 ]; then
  echo "Failed: ${failed[*]}"
  exit 1
fi
