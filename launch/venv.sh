# Sourced: make_venv FOLDER PYTHON WHAT... makes a virtual environment, and installs WHAT with pip
# unless the same was installed before.

find_python() {  # the first of the names given that runs and is Python 3.11 or newer
  for candidate in "$@"; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$candidate" && return
  done
  return 1
}

make_venv() {
  local folder=$1 python=$2 stamp; shift 2
  if ! [ -x "$folder/bin/python" ]; then
    "$python" -m venv "$folder" 2>/dev/null || {  # Debian without python3-venv has no ensurepip
      rm -rf "$folder"
      "$python" -m venv --without-pip "$folder"
    }
  fi
  stamp=$(cat requirements.txt pyproject.toml <(echo "$PWD $*") | sha256sum)
  if [ "$(cat "$folder/installed" 2>/dev/null)" != "$stamp" ]; then
    echo "installing into $folder ..." >&2
    if "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
      "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@" || return
    else
      "$python" -m pip --python "$folder/bin/python" install --quiet --disable-pip-version-check "$@" || return
    fi
    echo "$stamp" > "$folder/installed"
  fi
}
