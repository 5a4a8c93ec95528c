#!/usr/bin/env bash
# From an empty machine with Python 3.11+ and pip to a small GPT that writes Python, in some minutes:
#   bash launch/quickstart.sh [--config.KEY=VALUE ...]
# Run again, it resumes, or shows what it reached. WORKDIR=... chooses another folder.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
python=$(find_python "${PYTHON:-python3}" python3.13 python3.12 python3.11) || {
  echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3" >&2
  exit 2
}
make_venv .venv "$python" -r requirements.txt -e .
workdir=${WORKDIR:-runs/quickstart}
echo "Training a GPT of 1 M parameters on the standard library's sources, in $workdir" >&2
exec .venv/bin/mlm-jax train --config quickstart --workdir "$workdir" "$@"
