# Which TPU and which run: the one file that every script in launch/tpu reads. It is bash.
#
#   cp launch/variables.example.sh launch/variables.sh      # then fill it in; --variables=FILE names another
#
# What is empty here must be filled in; the rest may stay. launch/README.md explains the choices.
# shellcheck shell=bash disable=SC2034  # read by the scripts

# --- the TPU ---
TPU_PROJECT=""                     # the Google Cloud project's id
TPU_ZONE="us-west4-a"              # a zone that has the type
TPU_NAME="dmdr"                    # yours to choose: small letters, digits, hyphens
TPU_TYPE="v5litepod-16"            # accelerator type of one slice
TPU_RUNTIME="v2-alpha-tpuv5-lite"  # software of the TPU VMs: goes with the type
TPU_QUEUED="yes"                   # yes: a queued resource, waits until there is room; no: created at once or not at all
TPU_SPOT="no"                      # yes: cheaper, may be taken away at any time
TPU_SLICES=1                       # more than one: multi-slice, only as a queued resource
TPU_CREATE_FLAGS=()                # more flags for creating, such as (--reserved) or (--service-account=...)
TPU_SSH_FLAGS=()                   # more flags for ssh and scp, such as (--internal-ip) or (--tunnel-through-iap)

# --- the run ---
RUN_BUCKET=""                      # gs://...: where runs are kept; made by setup.sh, in the zone's region
# What `python -m dmdr_jax.train` is given, one word each: quotes keep spaces together. A path is on the workers, or gs://.
# This is the embedded world, which needs no model and no data: a first run that shows whether everything works.
RUN_ARGUMENTS=(
  --config=configs/shapes/sd3.py
  --workdir="$RUN_BUCKET/runs/first"
)
# A real one, with RUN_DATA=("$RUN_BUCKET/stable-diffusion-3-medium-diffusers" "$RUN_BUCKET/prompts.txt"):
#   RUN_ARGUMENTS=(
#     --config=configs/sd3_medium.py
#     --workdir="$RUN_BUCKET/runs/sd3"
#     --config.model=data/stable-diffusion-3-medium-diffusers
#     --config.prompts=data/prompts.txt
#   )
RUN_DATA=()                        # gs:// folders or files that every worker gets as data/NAME: models, prompts
RUN_ENV_FILE=""                    # a file here with NAME=VALUE lines for the run, such as HF_TOKEN=...; keep it out of the repository

# --- how ---
RUN_PYTHON="3.11"                  # of the workers' virtual environment
RUN_RESTARTS=3                     # watch.sh: how often in a row a run that failed is started again
POLL_SECONDS=60                    # between two looks
PATIENCE=10                        # watch.sh: how often in a row Google Cloud may fail to answer or to give the TPU
