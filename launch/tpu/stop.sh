#!/usr/bin/env bash
# Ends the run on all workers: it saves and exits. run.sh with the same arguments goes on.
#
#   bash launch/tpu/stop.sh [--seconds=120]
#
# --seconds=N  how long it may take to save before it is killed
# Again, or with nothing running: nothing. A watch.sh that sees it ends as well.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "seconds=120" "$@"
load TPU_PROJECT TPU_ZONE TPU_NAME
require_ready
# shellcheck disable=SC2154  # set by options
everywhere "[ ! -f $WORKER ] || $(worker_line stop "$OPT_seconds")"
