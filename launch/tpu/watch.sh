#!/usr/bin/env bash
# Sees a run through to its end: makes the TPU, copies, installs, starts, and does so again whenever it is preempted.
#
#   bash launch/tpu/watch.sh [--delete-when-done] [-- --config=FILE --workdir=gs://... ...]
#
# --delete-when-done  delete the TPU when the run has finished
#
# Keeps nothing of its own: it can be ended and started again, anywhere, and goes on from what it finds. Start it in
# tmux or on a small VM; the run does not depend on it, only the recovery does. It ends
#   with 0  when the run has finished on all workers, or somebody has stopped it with stop.sh;
#   with 1  when the run was refused (exit status 2: an error that the same command would meet again), or failed
#           RUN_RESTARTS + 1 times in a row, or Google Cloud failed PATIENCE times in a row.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "delete_when_done" "$@"
load TPU_PROJECT TPU_ZONE TPU_NAME TPU_TYPE TPU_RUNTIME
training_arguments
if ! workdir_is_remote; then
  [ "$TPU_SPOT" = no ] || die "the workdir $WORKDIR lies on the TPU's disk, which goes with a preempted spot TPU; use gs://"
  # shellcheck disable=SC2154  # set by options
  [ "$OPT_delete_when_done" = no ] || die "the workdir $WORKDIR lies on the TPU's disk, which --delete-when-done deletes; use gs://"
fi

HEALTHY_SECONDS=3600 # a run that lasted so long starts with all its restarts again

# script NAME ARGUMENT...: one of the scripts beside this, with the same variables.
script() {
  local name="$1" dry=()
  shift
  [ "$DRY_RUN" = no ] || dry=(--dry-run)
  bash "$TPU_SCRIPTS/$name" --variables="$VARIABLES" ${dry[@]+"${dry[@]}"} "$@"
}

bring_up() { script create.sh && script copy.sh && script install.sh && script run.sh -- "${RUN_ARGUMENTS[@]}"; }

# verdict LINES: what the workers' states together mean.
#   finished  on all; stopped  by stop.sh on one; refused, failed  on one; busy  with another run on one;
#   running   on all, or on some while the others have finished; idle  otherwise: it has to be started
verdict() {
  local words
  words="$(cut -d ' ' -f 1,2 <<<"$1" | sort -u)"
  case "$words" in
    *busy*) echo busy ;;
    *"failed 2"*) echo refused ;;
    *failed*) echo failed ;;
    *stopped*) echo stopped ;;
    "finished 0") echo finished ;;
    "running -" | $'finished 0\nrunning -') echo running ;;
    *) echo idle ;;
  esac
}

done_with() {
  say "$1"
  [ "$OPT_delete_when_done" = no ] || script delete.sh
  exit 0
}

if [ "$DRY_RUN" = yes ]; then
  bring_up
  worker_states "${RUN_ARGUMENTS[@]}"
  [ "$OPT_delete_when_done" = no ] || script delete.sh
  exit 0
fi

restarts=0 troubles=0 started="" last=""
ours=no # the run was stopped by this watch, to be started again

trouble() {
  troubles=$((troubles + 1))
  [ "$troubles" -lt "$PATIENCE" ] || die "$1, $troubles times in a row"
  say "$1; looking again in $POLL_SECONDS seconds"
  last=""
}

# start: brings up whatever is missing and starts the run.
start() {
  if bring_up; then
    started=$SECONDS troubles=0 ours=no
  else
    trouble "it could not be started (above)"
  fi
}

# start_again LINES: after a run of this watch's ended before its time. One that SIGTERM ended is not its own fault:
# that is how a preemption begins, before the TPU's state says so.
start_again() {
  if [ -n "$started" ] && ! grep -q -E 'killed [0-9]' <<<"$1"; then
    [ $((SECONDS - started)) -lt "$HEALTHY_SECONDS" ] || restarts=0
    restarts=$((restarts + 1))
    script logs.sh --once --lines=40 || true
    [ "$restarts" -le "$RUN_RESTARTS" ] || die "the run failed $restarts times in a row; its last lines are above"
    say "the run ended too early; starting it again, $restarts of $RUN_RESTARTS times"
  fi
  # What still runs on some workers waits for the others.
  ours=yes
  if script stop.sh --seconds=30; then start; else trouble "a worker cannot be reached"; fi
}

while :; do
  if ! state="$(tpu_state)"; then
    trouble "gcloud does not answer"
  elif [ "$state" != READY ]; then
    say "$(date -u '+%H:%M:%S UTC') TPU $TPU_NAME: $state"
    restarts=0
    start
  elif ! lines="$(worker_states "${RUN_ARGUMENTS[@]}")"; then
    trouble "a worker cannot be reached"
  else
    now="$(verdict "$lines")"
    [ "$now" = "$last" ] || say "$(date -u '+%H:%M:%S UTC') run in $WORKDIR: $now"
    last="$now"
    case "$now" in
      running) troubles=0 started="${started:-$SECONDS}" ;;
      finished) done_with "the run has finished: $WORKDIR" ;;
      refused)
        script logs.sh --once --lines=10 || true
        die "the run was refused; its last lines are above"
        ;;
      failed | idle) start_again "$lines" ;;
      busy) die "another run is under way on $TPU_NAME; stop.sh ends it" ;;
      stopped)
        # Found at the beginning it is what this command is to go on with; later somebody wanted it so.
        if [ -n "$started" ] && [ "$ours" = no ]; then
          say "the run was stopped"
          exit 0
        fi
        start
        ;;
    esac
  fi
  sleep "$POLL_SECONDS"
done
