#!/usr/bin/env bash
# All tests: bash launch/test.sh [--full] [pytest arguments]
# The fast tier on this Python, then the smoke set on a newer one, if there is one, with the newest
# jax. --full adds the tests marked slow, and types.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
python=$(find_python "${PYTHON:-python3}" python3.11 python3.12 python3.13) || {
  echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3" >&2
  exit 2
}
full=
if [ "${1:-}" = --full ]; then full=yes; shift; fi

make_venv .venv "$python" -r requirements.txt -e ".[dev]"
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
if [ "$full" ]; then
  .venv/bin/pyright --pythonpath .venv/bin/python
  .venv/bin/python -m pytest -q --durations=15 "$@"
else
  .venv/bin/python -m pytest -q --durations=15 -m "not slow" "$@"
fi

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
for newer in 3.14 3.13 3.12; do
  [ "$newer" = "$(version .venv/bin/python)" ] && break  # none is newer than this one
  other=$(find_python "python$newer" "$HOME/.pyenv/versions/$newer"*/bin/python) || continue
  make_venv ".venv-$newer" "$other" --upgrade -r requirements.txt -e ".[dev]" || continue
  echo "smoke set on Python $newer, jax $(".venv-$newer/bin/python" -c 'import jax; print(jax.__version__)')"
  ".venv-$newer/bin/python" -m pytest -q -m "smoke and not slow" "$@"
  break
done
