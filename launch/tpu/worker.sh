#!/usr/bin/env bash
# Runs on each TPU VM, started over ssh by the scripts beside it; everything lies in ~/dmdr:
#
#   code/       the repository; code/runs and code/data lead to the next two
#   runs/       workdirs that are not gs://
#   data/       what RUN_DATA brought
#   venv/       Python and packages
#   train.log   what every run so far has printed
#   train.*     the run's lock, process, command and ending
#
#   worker.sh unpack ARCHIVE       puts the archive's files into code/, and removes what the last archive alone had
#   worker.sh install PYTHON URL.. makes the environment, fetches gs:// folders and files into data/
#   worker.sh start [--env FILE] -- ARGUMENT...   trains, detached; nothing if the same command is running
#   worker.sh state ARGUMENT...    one line: dmdr-state WORD STATUS HOST, WORD being
#                                    running   this command is                 busy     another command is
#                                    finished  it came to its end              failed   it ended with STATUS
#                                    stopped   by worker.sh stop               killed   SIGTERM or the machine stopped it
#                                    none      it has not been started
#   worker.sh stop SECONDS         asks the run to save and end, and ends it after SECONDS
#   worker.sh log LINES [follow]   the end of train.log
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
HOME_DIR="$(cd "$HERE/../../.." && pwd)" # ~/dmdr
CODE="$HOME_DIR/code"
VENV="$HOME_DIR/venv"
LOG="$HOME_DIR/train.log"
LOCK="$HOME_DIR/train.lock" # held by `supervise` as long as the run lives
PID="$HOME_DIR/train.pid"
COMMAND="$HOME_DIR/train.command"
ENDING="$HOME_DIR/train.ending"
STOP_ASKED="$HOME_DIR/train.stop"

die() {
  echo "error: $HOSTNAME: $*" >&2
  exit 1
}

unpack() {
  local archive="$1" new="$HOME_DIR/code.files.new" old="$HOME_DIR/code.files"
  tar -tzf "$archive" | grep -v '/$' | LC_ALL=C sort >"$new"
  tar -xzf "$archive" -C "$CODE"
  if [ -f "$old" ]; then
    (cd "$CODE" && LC_ALL=C comm -23 "$old" "$new" | tr '\n' '\0' | xargs -0 -r rm -f --)
  fi
  mv "$new" "$old"
  rm -f "$archive"
  mkdir -p "$HOME_DIR/runs" "$HOME_DIR/data"
  link runs
  link data
}

# A folder that outlives the code, under its name there; one that the repository has itself stays.
link() { [ -e "$CODE/$1" ] || ln -s "../$1" "$CODE/$1"; }

install() {
  local python="$1" wanted url
  shift
  wanted="$(echo "$python" | cat - "$CODE/requirements.txt" "$HERE/requirements.txt")"
  if [ "$wanted" != "$(cat "$VENV/installed" 2>/dev/null)" ]; then
    find_uv
    # uv brings its own Python: the images' is too old.
    has_python "$python" || uv venv --quiet --clear --python "$python" "$VENV"
    uv pip install --quiet --python "$VENV/bin/python" -r "$CODE/requirements.txt" -r "$HERE/requirements.txt"
    echo "$wanted" >"$VENV/installed"
  fi
  for url in "$@"; do fetch "$url"; done
}

has_python() {
  [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')"
}

find_uv() {
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || python3 -m pip install --user --quiet uv || curl -LsSf https://astral.sh/uv/install.sh | sh
  command -v uv >/dev/null || die "uv could not be installed"
}

# A folder is brought up to date, a file fetched anew.
fetch() {
  local url="${1%/}" name
  name="$(basename "$url")"
  if gcloud storage ls "$url/" >/dev/null 2>&1; then
    mkdir -p "$HOME_DIR/data/$name"
    gcloud storage rsync --recursive "$url" "$HOME_DIR/data/$name"
  else
    gcloud storage cp "$url" "$HOME_DIR/data/$name"
  fi
}

running() { ! (flock --nonblock 9) 9>>"$LOCK"; }

words() { printf '%q ' "$@"; }

start() {
  local env=""
  if [ "$1" = --env ]; then
    env="$2"
    chmod 600 "$env"
    shift 2
  fi
  shift # --
  [ -x "$VENV/bin/python" ] || die "nothing is installed; run install.sh first"
  exec 9>>"$LOCK"
  if ! flock --wait 0.3 9; then # `state` may be holding it for a moment
    [ "$(words "$@")" = "$(cat "$COMMAND")" ] || die "another run is under way: $(cat "$COMMAND")"
    echo "$HOSTNAME: already running"
    return
  fi
  rm -f "$ENDING" "$STOP_ASKED"
  words "$@" >"$COMMAND"
  # A session of its own: the end of this ssh connection does not reach it. It inherits the lock.
  setsid nohup bash "$HERE/worker.sh" supervise "$env" "$@" >>"$LOG" 2>&1 </dev/null &
  echo $! >"$PID"
  echo "$HOSTNAME: started"
}

# The run's parent: hands on SIGTERM, so that training saves, and writes down how it ended.
supervise() {
  local env="$1" child="" status=0 terminated=no signalled
  shift
  trap 'terminated=yes signalled=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT HUP
  printf '\n== %s: python -m dmdr_jax.train %s\n' "$(date -u '+%Y-%m-%d %H:%M:%S UTC')" "$(words "$@")"
  [ -z "$env" ] || read_env "$env"
  cd "$CODE"
  PYTHONUNBUFFERED=1 "$VENV/bin/python" -m dmdr_jax.train "$@" 9>&- &
  child=$!
  [ "$terminated" = no ] || kill -TERM "$child" 2>/dev/null || true
  # A signal ends `wait`, whose status is then the signal's, also where the child has ended meanwhile.
  signalled=yes
  while [ "$signalled" = yes ]; do
    signalled=no status=0
    wait "$child" || status=$?
  done
  if [ -e "$STOP_ASKED" ]; then
    echo "stopped $status" >"$ENDING"
  elif [ "$terminated" = yes ]; then
    echo "killed $status" >"$ENDING"
  elif [ "$status" -eq 0 ]; then
    echo "finished 0" >"$ENDING"
  else
    echo "failed $status" >"$ENDING"
  fi
  printf '== %s: %s\n' "$(date -u '+%Y-%m-%d %H:%M:%S UTC')" "$(cat "$ENDING")"
}

# NAME=VALUE lines, taken as they are: no quotes, no expansion; # begins a comment line.
read_env() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    case "$line" in '' | '#'*) ;; *=*) export "${line?}" ;; *) die "$1: not NAME=VALUE: ${line%% *}" ;; esac
  done <"$1"
}

state() {
  local same=no
  [ "$(words "$@")" = "$(cat "$COMMAND" 2>/dev/null)" ] && same=yes
  if running; then
    if [ "$same" = yes ]; then report "running -"; else report "busy -"; fi
  elif [ "$same" = no ]; then
    report "none -"
  elif [ -s "$ENDING" ]; then
    report "$(cat "$ENDING")"
  else
    report "killed -" # without a word: kill -9, or the machine restarted
  fi
}

report() { echo "dmdr-state $1 $HOSTNAME"; }

stop() {
  local seconds="$1" pid
  running || return 0
  pid="$(cat "$PID")"
  touch "$STOP_ASKED"
  kill -TERM "$pid" 2>/dev/null || true
  exec 9>>"$LOCK"
  if ! flock --wait "$seconds" 9; then
    echo "$HOSTNAME: it did not end within $seconds seconds, and is ended"
    kill -KILL -- "-$pid"
    echo "stopped 137" >"$ENDING"
  fi
  echo "$HOSTNAME: stopped"
}

log() {
  [ -f "$LOG" ] || die "nothing has run yet"
  if [ "${2:-}" = follow ]; then exec tail -n "$1" -F "$LOG"; else tail -n "$1" "$LOG"; fi
}

case "${1:-}" in
  unpack | install | start | supervise | state | stop | log) "$@" ;;
  *) die "unknown command '${1:-}'" ;;
esac
