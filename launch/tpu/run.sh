#!/usr/bin/env bash
# Starts training on all workers of all slices; it goes on when this machine is switched off.
#
#   bash launch/tpu/run.sh [-- --config=FILE --workdir=gs://... ...]
#
# Without arguments after -- it takes RUN_ARGUMENTS. Again: nothing where the same command is running; the same
# command in the same workdir goes on where it stopped. After install.sh. Follow it with logs.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "" "$@"
load TPU_PROJECT TPU_ZONE TPU_NAME
training_arguments
require_ready
if ! workdir_is_remote; then
  say "note: the workdir $WORKDIR lies on the workers' disks, and goes with them; with several workers it must be gs://"
fi
environment=()
# shellcheck disable=SC2088  # the worker's home directory: ssh starts there
[ -z "$RUN_ENV_FILE" ] || environment=(--env dmdr-run.env)
say "starting: python -m dmdr_jax.train $(quote "${RUN_ARGUMENTS[@]}")"
everywhere "$(worker_line start ${environment[@]+"${environment[@]}"} -- "${RUN_ARGUMENTS[@]}")"
