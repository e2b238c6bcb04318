#!/usr/bin/env bash
# Fails if a source file is longer than 400 lines, and names it.
set -euo pipefail
cd "$(dirname "$0")/.."

long=$(find scar_jax tests configs launch setup.py \
  -name '*.py' -exec wc -l {} + -o -name '*.sh' -exec wc -l {} + |
  awk '$2 != "total" && $1 > 400 {print $2 ": " $1 " lines"}')
if [ -n "$long" ]; then
  echo "Longer than 400 lines; split by concept:" >&2
  echo "$long" >&2
  exit 1
fi
