#!/usr/bin/env bash
# Says how the TPU is and, on every worker, how the run is.
#
#   bash launch/tpu/status.sh [-- ARGUMENT...]
#
# The run is the one of RUN_ARGUMENTS, or of what follows --. launch/tpu/worker.sh explains the words.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "" "$@"
load TPU_PROJECT TPU_ZONE TPU_NAME
training_arguments
state="$(tpu_state)" || die "gcloud does not say how the TPU $TPU_NAME is (above)"
say "TPU $TPU_NAME: $state"
[ "$state" = READY ] || exit 0
say "run in $WORKDIR (state, exit status, worker):"
worker_states "${RUN_ARGUMENTS[@]}" || die "a worker cannot be reached (above)"
