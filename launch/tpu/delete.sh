#!/usr/bin/env bash
# Deletes the TPU: nothing more is charged for it. What is in the bucket stays.
#
#   bash launch/tpu/delete.sh [--yes]
#
# --yes  also when the run's workdir lies on the TPU's own disk and goes with it
# Again, or with nothing there: nothing.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "yes" "$@"
load TPU_PROJECT TPU_ZONE TPU_NAME
state="$(tpu_state)" || die "gcloud does not say how the TPU $TPU_NAME is (above)"
if [ "$state" = ABSENT ]; then
  say "there is no TPU $TPU_NAME"
  exit 0
fi
WORKDIR="$(argument_of workdir ${RUN_ARGUMENTS[@]+"${RUN_ARGUMENTS[@]}"})"
# shellcheck disable=SC2154  # set by options
if [ "$state" = READY ] && [ "$OPT_yes" = no ] && [ -n "$WORKDIR" ] && ! workdir_is_remote; then
  die "the workdir $WORKDIR lies on the TPU's disk and would be lost; fetch.sh brings it here, --yes deletes all the same"
fi
if [ "$TPU_QUEUED" = yes ]; then
  run gcloud compute tpus queued-resources delete "$TPU_NAME" "${PLACE[@]}" --force --quiet
else
  run gcloud compute tpus tpu-vm delete "$TPU_NAME" "${PLACE[@]}" --quiet
fi
say "$TPU_NAME is deleted"
