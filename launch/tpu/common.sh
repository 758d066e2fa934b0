# Sourced by the scripts beside it: options, variables, commands that are shown before they run, and the TPU's state.
# shellcheck shell=bash
#
# Runs on bash 3.2 (macOS) too: hence ${array[@]+"${array[@]}"} for arrays that may be empty.

set -euo pipefail

TPU_SCRIPTS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ROOT="$(cd "$TPU_SCRIPTS/../.." && pwd)"
VARIABLES="$ROOT/launch/variables.sh"
DRY_RUN=no
ASSUMED=READY # what --dry-run takes the TPU to be
REST=()
# On the workers, from the home directory; worker.sh knows the same place.
WORKER="dmdr/code/launch/tpu/worker.sh"

die() {
  echo "error: $*" >&2
  exit 1
}

say() { echo "== $*"; }

# --- options ---

# The comment at the top of the script, then what all scripts take.
usage() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
  cat <<'TEXT'

Options of every script:
  --variables=FILE  which TPU and which run (default: launch/variables.sh)
  --dry-run         print every command it would run, and run none
  --help            this text
TEXT
}

# options "FLAG NAME=DEFAULT ..." ARGUMENT...: sets OPT_FLAG (yes or no) and OPT_NAME; what follows -- goes to REST.
options() {
  local known="$1" spec word
  shift
  for spec in $known; do
    case "$spec" in
      *=*) printf -v "OPT_${spec%%=*}" '%s' "${spec#*=}" ;;
      *) printf -v "OPT_$spec" '%s' no ;;
    esac
  done
  while [ $# -gt 0 ]; do
    word="$1"
    shift
    case "$word" in
      -h | --help) usage && exit 0 ;;
      --dry-run) DRY_RUN=yes ;;
      --variables=*) VARIABLES="${word#*=}" ;;
      --variables)
        [ $# -gt 0 ] || usage_error "--variables needs a file"
        VARIABLES="$1"
        shift
        ;;
      --) REST=("$@") && break ;;
      *) own_option "$known" "$word" ;;
    esac
  done
  # Commands are shown on stderr, as the scripts' own output may be piped; with --dry-run they are the output.
  if [ "$DRY_RUN" = yes ]; then exec 3>&1; else exec 3>&2; fi
}

own_option() {
  local known="$1" word="$2" spec name="${2#--}"
  name="${name%%=*}"
  for spec in $known; do
    case "$spec" in
      "${name//-/_}")
        printf -v "OPT_$spec" '%s' yes
        return
        ;;
      "${name//-/_}"=*)
        case "$word" in
          --*=*) printf -v "OPT_${spec%%=*}" '%s' "${word#*=}" ;;
          *) usage_error "--$name needs a value: --$name=..." ;;
        esac
        return
        ;;
    esac
  done
  usage_error "unknown option $word"
}

usage_error() {
  echo "error: $*; see --help" >&2
  exit 2
}

# --- variables ---

# load NAME...: reads the variables file; the names are those that this script cannot do without.
load() {
  local name missing=""
  # Only the file counts: what happens to be exported under these names does not.
  TPU_PROJECT="" TPU_ZONE="" TPU_NAME="" TPU_TYPE="" TPU_RUNTIME="" TPU_CREATE_FLAGS=() TPU_SSH_FLAGS=()
  TPU_QUEUED=yes TPU_SPOT=no TPU_SLICES=1
  RUN_BUCKET="" RUN_ARGUMENTS=() RUN_DATA=() RUN_ENV_FILE="" RUN_PYTHON=3.11 RUN_RESTARTS=3
  POLL_SECONDS=60 PATIENCE=10
  [ -f "$VARIABLES" ] || die "there is no $VARIABLES; copy launch/variables.example.sh to it and fill it in," \
    "or name another file with --variables=FILE"
  # shellcheck source=launch/variables.example.sh
  source "$VARIABLES"
  for name in "$@"; do
    [ -n "${!name:-}" ] || missing="$missing${missing:+, }$name"
  done
  [ -z "$missing" ] || die "$VARIABLES does not set $missing"
  check_variables
  PLACE=(--project="$TPU_PROJECT" --zone="$TPU_ZONE")
}

check_variables() {
  case "$TPU_QUEUED$TPU_SPOT" in
    yesyes | yesno | noyes | nono) ;;
    *) die "$VARIABLES: TPU_QUEUED and TPU_SPOT are yes or no, not '$TPU_QUEUED' and '$TPU_SPOT'" ;;
  esac
  case "$TPU_SLICES" in
    '' | *[!0-9]* | 0*) die "$VARIABLES: TPU_SLICES is a number from 1 on, not '$TPU_SLICES'" ;;
  esac
  if [ "$TPU_SLICES" -gt 1 ] && [ "$TPU_QUEUED" = no ]; then
    die "$VARIABLES: $TPU_SLICES slices can only be had as a queued resource; set TPU_QUEUED=yes"
  fi
  if [ -n "$RUN_ENV_FILE" ] && [ ! -f "$RUN_ENV_FILE" ]; then
    die "$VARIABLES: RUN_ENV_FILE=$RUN_ENV_FILE is not there"
  fi
}

# argument_of NAME WORD...: the value of --NAME=VALUE or --NAME VALUE among the words; nothing where there is none.
argument_of() {
  local name="$1" value="" previous="" word
  shift
  for word in "$@"; do
    case "$previous" in "--$name" | "-$name") value="$word" ;; esac
    case "$word" in "--$name="* | "-$name="*) value="${word#*=}" ;; esac
    previous="$word"
  done
  printf '%s' "$value"
}

# training_arguments: RUN_ARGUMENTS, or what the command line has after --, checked; also sets WORKDIR.
training_arguments() {
  [ ${#REST[@]} -eq 0 ] || RUN_ARGUMENTS=("${REST[@]}")
  [ -n "${RUN_ARGUMENTS[*]+set}" ] || die "$VARIABLES does not set RUN_ARGUMENTS, and none are given after --"
  WORKDIR="$(argument_of workdir "${RUN_ARGUMENTS[@]}")"
  [ -n "$(argument_of config "${RUN_ARGUMENTS[@]}")" ] || die "RUN_ARGUMENTS has no --config=FILE"
  [ -n "$WORKDIR" ] || die "RUN_ARGUMENTS has no --workdir=FOLDER"
  # The example's "$RUN_BUCKET/runs/first" with the bucket not filled in.
  case "$RUN_BUCKET$WORKDIR" in /runs/*) die "$VARIABLES does not set RUN_BUCKET, and the workdir is $WORKDIR" ;; esac
}

workdir_is_remote() { case "$WORKDIR" in gs://*) return 0 ;; *) return 1 ;; esac }

# --- commands ---

# quote WORD...: one line that a shell reads back as these words.
quote() {
  local word line="" quoted mark="'"
  for word in "$@"; do
    case "$word" in
      '' | *[!A-Za-z0-9_@%+=:,./-]*)
        quoted="'"
        while [ "$word" != "${word#*"$mark"}" ]; do
          quoted="$quoted${word%%"$mark"*}'\\''"
          word="${word#*"$mark"}"
        done
        word="$quoted$word'"
        ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s' "$line"
}

show() { printf '+ %s\n' "$(quote "$@")" >&3; }

# run WORD...: shows the command and runs it.
run() {
  show "$@"
  [ "$DRY_RUN" = yes ] || "$@" </dev/null
}

# --- the TPU's state ---

# The names of the nodes: one for each slice.
nodes() {
  local slice
  if [ "$TPU_SLICES" -eq 1 ]; then
    echo "$TPU_NAME"
  else
    for ((slice = 0; slice < TPU_SLICES; slice++)); do echo "$TPU_NAME-$slice"; done
  fi
}

# look KIND NAME FIELD: one field of a queued resource or node, ABSENT where there is none. Status 1: gcloud failed.
# With --dry-run it shows the command and answers with ASSUMED.
look() {
  local command=(gcloud compute tpus "$1" describe "$2" "${PLACE[@]}" --format="value($3)") errors answer status=0
  if [ "$DRY_RUN" = yes ]; then
    show "${command[@]}"
    case "$1-$ASSUMED" in *-ABSENT) echo ABSENT ;; tpu-vm-*) echo READY ;; *) echo ACTIVE ;; esac
    return
  fi
  errors="$(mktemp)"
  answer="$("${command[@]}" </dev/null 2>"$errors")" || status=$?
  if [ "$status" -ne 0 ]; then
    # gcloud's exit status is 1 whatever went wrong; only its words tell.
    if [ "$status" -ne 127 ] && grep -q -i 'not[_ ]found' "$errors" &&
      ! grep -q -i -E "(project|zone|location|region|account)s? [^ ]* *(was |is )?not found" "$errors"; then
      answer=ABSENT status=0
    else
      cat "$errors" >&2
      status=1
    fi
  fi
  rm -f "$errors"
  printf '%s\n' "$answer"
  return "$status"
}

# tpu_state: one of
#   ABSENT   it does not exist                READY    all its nodes can be used
#   WAITING  it is in the queue or coming     LEAVING  it is being deleted
#   GONE     it was preempted or ended        FAILED   the request failed
#   STOPPED  somebody stopped it
# Status 1: gcloud failed.
tpu_state() {
  local raw
  if [ "$TPU_QUEUED" = no ]; then
    node_state "$TPU_NAME"
  else
    raw="$(look queued-resources "$TPU_NAME" state.state)" || return 1
    case "$raw" in
      ACTIVE) all_nodes_state ;;
      ABSENT | FAILED) echo "$raw" ;;
      SUSPENDED) echo GONE ;;
      SUSPENDING | DELETING) echo LEAVING ;;
      *) echo WAITING ;;
    esac
  fi
}

node_state() {
  local raw
  raw="$(look tpu-vm "$1" state)" || return 1
  case "$raw" in
    READY | ABSENT) echo "$raw" ;;
    PREEMPTED | TERMINATED) echo GONE ;;
    DELETING) echo LEAVING ;;
    STOPPED | STOPPING) echo STOPPED ;;
    *) echo WAITING ;;
  esac
}

# The nodes of an active queued resource: a preempted node shows before the resource does.
all_nodes_state() {
  local node state worst=READY
  for node in $(nodes); do
    state="$(node_state "$node")" || return 1
    case "$state" in
      READY) ;;
      ABSENT) worst=GONE ;;
      *) [ "$worst" = GONE ] || worst="$state" ;;
    esac
  done
  echo "$worst"
}

# require_ready: ends the script unless the TPU can be used.
require_ready() {
  local state
  state="$(tpu_state)" || die "gcloud does not say how the TPU $TPU_NAME is (above)"
  [ "$state" = READY ] || die "the TPU $TPU_NAME is $state, not READY; bash launch/tpu/create.sh makes it so"
}

# --- the workers ---

# gcloud's tpu-vm command: the connection flags of IAP and batching are in its alpha track only.
tpu_vm() {
  case " ${TPU_SSH_FLAGS[*]+"${TPU_SSH_FLAGS[*]}"} " in
    *" --tunnel-through-iap "* | *" --batch-size"*) run gcloud alpha compute tpus tpu-vm "$@" ;;
    *) run gcloud compute tpus tpu-vm "$@" ;;
  esac
}

# on_worker NODE WORKER LINE: runs a line of shell there; WORKER is a number or `all`.
on_worker() {
  tpu_vm ssh "$1" "${PLACE[@]}" --worker="$2" --quiet ${TPU_SSH_FLAGS[@]+"${TPU_SSH_FLAGS[@]}"} --command="$3"
}

# send FILE NAME NODE: puts a file into the home directory of all workers of a node.
send() {
  tpu_vm scp "$1" "$3:$2" "${PLACE[@]}" --worker=all --quiet ${TPU_SSH_FLAGS[@]+"${TPU_SSH_FLAGS[@]}"}
}

# each_node FUNCTION ARGUMENT...: the function with every node as last argument, all nodes at once; status 1 if any failed.
#
# Slices are reached one by one and not with `queued-resources ssh --node=all`, which only warns when it cannot
# reach one of them, and so would start a run that waits for ever for its other half.
each_node() {
  local node status=0 jobs=() job
  for node in $(nodes); do
    if [ "$DRY_RUN" = yes ]; then
      "$@" "$node"
    else
      "$@" "$node" &
      jobs+=("$!")
    fi
  done
  for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job" || status=1; done
  return "$status"
}

_line_on_node() { on_worker "$2" all "$1"; }

# everywhere LINE: runs a line of shell on all workers of all slices.
everywhere() { each_node _line_on_node "$1"; }

# worker_line WORD...: the line that has worker.sh do this.
worker_line() { printf 'bash %s %s' "$WORKER" "$(quote "$@")"; }

# worker_states ARGUMENT...: how the run with these arguments is on each worker, a line each: a word as in worker.sh,
# the exit status or -, and the host's name. Status 1: some worker could not be reached.
worker_states() {
  local line out
  # Before the code is there no run is.
  line="if [ -f $WORKER ]; then $(worker_line state "$@"); else echo dmdr-state none - \$HOSTNAME; fi"
  if [ "$DRY_RUN" = yes ]; then
    everywhere "$line"
    return
  fi
  out="$(everywhere "$line")" || return 1
  printf '%s\n' "$out" | sed -n 's/^dmdr-state //p'
}
