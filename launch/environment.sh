# Sourced by the scripts beside it: makes or reuses the virtual environment and says what it does.
#
#   DMDR_VENV     where it lies (default: .venv in the repository)
#   DMDR_PYTHON   the Python to make it with, 3.11 or newer (default: python3)

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${DMDR_VENV:-.venv}"

find_python() {
  local candidate
  for candidate in "${DMDR_PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed (apt-get install python3 python3-venv); set DMDR_PYTHON to name one." >&2
  exit 2
}

# install FILE...: brings the environment to what the requirement files say; at once when it is there already.
install() {
  if [ ! -x "$VENV/bin/python" ]; then
    local python
    python="$(find_python)"
    echo "making the virtual environment $VENV with $python"
    if ! "$python" -m venv "$VENV"; then
      echo "error: cannot make a virtual environment; on Debian: apt-get install python3-venv." >&2
      exit 2
    fi
  fi
  local stamp file
  for file in "$@"; do
    stamp="$VENV/.installed-$(basename "$file")"
    if ! cmp -s "$file" "$stamp"; then
      echo "installing $file"
      "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file"
      cp "$file" "$stamp"
    fi
  done
  # Big buffers come and go in every step on a CPU: glibc should keep them rather than fault them in anew.
  export MALLOC_MMAP_THRESHOLD_=2147483648 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
  export TOKENIZERS_PARALLELISM=false
}
