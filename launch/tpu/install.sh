#!/usr/bin/env bash
# Installs Python and the packages on all workers (~/dmdr/venv) and fetches what RUN_DATA names (~/dmdr/data).
#
#   bash launch/tpu/install.sh
#
# Again: at once where the requirements have not changed. After copy.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "" "$@"
load TPU_PROJECT TPU_ZONE TPU_NAME
require_ready
say "installing on all workers"
everywhere "$(worker_line install "$RUN_PYTHON" ${RUN_DATA[@]+"${RUN_DATA[@]}"})"
