#!/usr/bin/env bash
# Copies this repository, as it is on the disk now, to all workers (~/dmdr/code).
#
#   bash launch/tpu/copy.sh
#
# What git ignores is left out. Again: brings the workers up to date, files removed here go there too. A run under way
# goes on with the code it has loaded; stop it first.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "" "$@"
load TPU_PROJECT TPU_ZONE TPU_NAME
require_ready

archive="${TMPDIR:-/tmp}/dmdr-code.$$.tgz"
list="$archive.list"
trap 'rm -f "$archive" "$list"' EXIT

# list_files: what git has or would take, zero-ended; removed files that git still lists are left out.
list_files() {
  local file
  git -C "$ROOT" ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    [ ! -e "$ROOT/$file" ] || printf '%s\0' "$file"
  done
}

if [ -e "$ROOT/.git" ]; then
  show git -C "$ROOT" ls-files -z --cached --others --exclude-standard
  [ "$DRY_RUN" = yes ] || list_files >"$list"
  run env COPYFILE_DISABLE=1 tar -czf "$archive" -C "$ROOT" --null -T "$list"
else
  cd "$ROOT" || exit
  run env COPYFILE_DISABLE=1 tar -czf "$archive" --exclude=__pycache__ --exclude=runs -- *
fi

say "sending the code to $(nodes | tr '\n' ' ')"
each_node send "$archive" dmdr-code.tgz
[ -z "$RUN_ENV_FILE" ] || each_node send "$RUN_ENV_FILE" dmdr-run.env
# shellcheck disable=SC2016  # $HOME is the worker's
everywhere 'mkdir -p dmdr/code && tar -xzf dmdr-code.tgz -C dmdr/code launch/tpu/worker.sh && bash '"$WORKER"' unpack "$HOME/dmdr-code.tgz"'
