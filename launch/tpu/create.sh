#!/usr/bin/env bash
# Makes the TPU and waits until it can be used.
#
#   bash launch/tpu/create.sh
#
# Again: nothing where it is there, waits where it is on its way, makes it anew where it was preempted or had failed.
# TPU_QUEUED, TPU_SPOT and TPU_SLICES say which kind. Ctrl-C ends the waiting only: the request stays.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "" "$@"
load TPU_PROJECT TPU_ZONE TPU_NAME TPU_TYPE TPU_RUNTIME
ASSUMED=ABSENT

request() {
  local flags=(--accelerator-type="$TPU_TYPE")
  [ "$TPU_SPOT" = no ] || flags+=(--spot)
  flags+=(${TPU_CREATE_FLAGS[@]+"${TPU_CREATE_FLAGS[@]}"})
  if [ "$TPU_QUEUED" = no ]; then
    run gcloud compute tpus tpu-vm create "$TPU_NAME" "${PLACE[@]}" --version="$TPU_RUNTIME" "${flags[@]}"
    return
  fi
  if [ "$TPU_SLICES" -eq 1 ]; then
    flags+=(--node-id="$TPU_NAME")
  else
    flags+=(--node-count="$TPU_SLICES" --node-prefix="$TPU_NAME")
  fi
  run gcloud compute tpus queued-resources create "$TPU_NAME" "${PLACE[@]}" --runtime-version="$TPU_RUNTIME" "${flags[@]}"
}

# until_not STATE: waits as long as the TPU is in this state; sets `state` to the one after. It may take some looks
# until a new request shows, and now and then gcloud gets no answer. What is being deleted ends with being absent.
until_not() {
  local misses=0 last="" answer
  while :; do
    if answer="$(tpu_state)" && [ "$answer" != ABSENT ] || [ "$1-${answer:-}" = LEAVING-ABSENT ]; then
      misses=0 state="$answer"
      [ "$state" = "$1" ] || return 0
      [ "$state" = "$last" ] || say "$TPU_NAME is $state"
      last="$state"
    else
      misses=$((misses + 1)) state="${answer:-unknown}"
      [ "$misses" -lt "$PATIENCE" ] || return 0
    fi
    sleep "$POLL_SECONDS"
  done
}

# What gcloud has to say about a request that failed.
reason() {
  gcloud compute tpus queued-resources describe "$TPU_NAME" "${PLACE[@]}" \
    --format="value(state.failedData.error.message)" </dev/null || true
}

state="$(tpu_state)" || die "gcloud does not say how the TPU $TPU_NAME is (above)"
[ "$state" != LEAVING ] || until_not LEAVING
case "$state" in
  READY)
    say "$TPU_NAME is there"
    exit 0
    ;;
  GONE | FAILED)
    say "$TPU_NAME is $state: made anew"
    bash "$TPU_SCRIPTS/delete.sh" --variables="$VARIABLES" --yes
    request
    ;;
  ABSENT) request ;;
  WAITING) say "$TPU_NAME is on its way" ;;
esac
ASSUMED=READY # from here on
until_not WAITING
case "$state" in
  READY) say "$TPU_NAME is READY" ;;
  FAILED) die "the request for $TPU_NAME failed: $(reason)" ;;
  STOPPED) die "$TPU_NAME is stopped; start it with \`gcloud compute tpus tpu-vm start\`, or delete.sh and create.sh" ;;
  GONE | LEAVING) die "$TPU_NAME was taken away while it was being made; the same command tries again" ;;
  *) die "$TPU_NAME is $state after $PATIENCE looks" ;;
esac
