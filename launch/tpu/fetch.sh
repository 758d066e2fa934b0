#!/usr/bin/env bash
# Brings the results of the run here: metrics, pictures, configuration.
#
#   bash launch/tpu/fetch.sh [--to=FOLDER] [--checkpoints] [-- ARGUMENT...]
#
# --to=FOLDER    where to (default: runs/NAME, NAME being the workdir's last part)
# --checkpoints  the checkpoints as well: they are large; a gs:// workdir keeps them anyway
# Again: brings what is new. From a gs:// workdir, also when the TPU has been deleted; from a local one, worker 0's.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "to= checkpoints" "$@"
load TPU_PROJECT TPU_ZONE TPU_NAME
training_arguments
# shellcheck disable=SC2154  # OPT_ variables are set by options
to="${OPT_to:-$ROOT/runs/$(basename "$WORKDIR")}"
run mkdir -p "$to"
# shellcheck disable=SC2154
if workdir_is_remote; then
  exclude=(--exclude='^checkpoints/.*') && [ "$OPT_checkpoints" = no ] || exclude=()
  run gcloud storage rsync "$WORKDIR" "$to" --recursive ${exclude[@]+"${exclude[@]}"} --project="$TPU_PROJECT"
else
  require_ready
  exclude=(--exclude=./checkpoints) && [ "$OPT_checkpoints" = no ] || exclude=()
  case "$WORKDIR" in /*) from="$WORKDIR" ;; *) from="dmdr/code/$WORKDIR" ;; esac
  line="$(quote tar -czf - ${exclude[@]+"${exclude[@]}"} -C "$from" .)"
  if [ "$DRY_RUN" = yes ]; then
    on_worker "$(nodes | head -n 1)" 0 "$line"
    show tar -xzf - -C "$to"
  else
    on_worker "$(nodes | head -n 1)" 0 "$line" | tar -xzf - -C "$to"
  fi
fi
say "in $to"
