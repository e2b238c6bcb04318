# shellcheck shell=bash
# Sourced by the other scripts: `set_up EXTRA` makes the virtual environment
# (once), installs the package with that extra (again only if setup.py changed)
# and activates it.
#
#   PYTHON  interpreter that makes the environment   (default: python3)
#   VENV    where it lies                            (default: .venv)

set_up() {
  local extra=$1 python=${PYTHON:-python3} venv=${VENV:-.venv}
  local stamp wanted other
  if [ ! -x "$venv/bin/python" ]; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "PYTHON=$python is not Python 3.11 or newer; set PYTHON to one" >&2
      return 1
    fi
    echo "Making the virtual environment $venv"
    "$python" -m venv "$venv" || return 1
  fi
  # shellcheck disable=SC1091
  . "$venv/bin/activate" || return 1
  stamp=$venv/.installed-$extra
  wanted="$(pwd) $(cksum <setup.py)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing the package with its extra '$extra' (a few minutes)"
    python -m pip install --quiet --disable-pip-version-check -e ".[$extra]" ||
      return 1
    # An environment holds the package of one checkout: no longer of another.
    for other in "$venv"/.installed-*; do
      [[ "$(cat "$other" 2>/dev/null)" == "$(pwd) "* ]] || rm -f "$other"
    done
    echo "$wanted" >"$stamp"
  fi
}
