#!/usr/bin/env bash
# What a pod runs: training, with an exit status that says whether it came to its end.
#
#   bash launch/gke/train.sh --config=FILE --workdir=gs://... ...
#
# Training that SIGTERM has made save exits with 0, as it has lost nothing. To a Kubernetes job 0 means complete, and a
# preempted run would not be started again: here it becomes 143, the status of a program that SIGTERM ended.
set -euo pipefail

child="" terminated=no status=0
trap 'terminated=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM
python -m dmdr_jax.train "$@" &
child=$!
[ "$terminated" = no ] || kill -TERM "$child" 2>/dev/null || true
# A signal ends `wait`, not the child.
while :; do
  status=0
  wait "$child" || status=$?
  kill -0 "$child" 2>/dev/null || break
done
[ "$terminated" = no ] || exit 143
exit "$status"
