#!/usr/bin/env bash
# Runs the tests, set-up included:  bash launch/test.sh [pytest arguments]
# The slow ones:                    bash launch/test.sh -m slow
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# PyTorch comes first: with it there, nothing else pulls a build for other hardware.
install requirements-test.txt requirements.txt
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
"$VENV/bin/ruff" check .
# A file at a time: its tests share what they have compiled.
exec "$VENV/bin/python" -m pytest -n "${DMDR_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
