#!/usr/bin/env bash
# Shows what the run prints, and follows it; Ctrl-C ends the following, not the run.
#
#   bash launch/tpu/logs.sh [--slice=0] [--worker=0] [--lines=100] [--once]
#
# --slice=N   of a multi-slice TPU
# --worker=N  of the slice, or all; they all print their progress; worker 0 of slice 0 writes the files
# --lines=N   how much of the past
# --once      do not follow
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "slice=0 worker=0 lines=100 once" "$@"
load TPU_PROJECT TPU_ZONE TPU_NAME
require_ready
# shellcheck disable=SC2154  # OPT_ variables are set by options
node="$(nodes | sed -n "$((OPT_slice + 1))p")"
[ -n "$node" ] || die "there is no slice $OPT_slice; TPU_SLICES is $TPU_SLICES, and the first is 0"
# shellcheck disable=SC2154
follow=(follow) && [ "$OPT_once" = no ] || follow=()
# shellcheck disable=SC2154
on_worker "$node" "$OPT_worker" "$(worker_line log "$OPT_lines" ${follow[@]+"${follow[@]}"})"
