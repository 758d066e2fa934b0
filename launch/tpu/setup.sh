#!/usr/bin/env bash
# Readies a Google Cloud project: switches on the APIs, makes the bucket, and lets the TPU VMs write to it.
#
#   bash launch/tpu/setup.sh
#
# Once for each project; harmless when repeated. The project must have billing. Quota for TPUs is asked for in the
# console, see launch/README.md.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "" "$@"
load TPU_PROJECT TPU_ZONE RUN_BUCKET

# The account that TPU VMs work as: the one in TPU_CREATE_FLAGS, or the project's default.
account() {
  local given number="PROJECT_NUMBER" command=(gcloud projects describe "$TPU_PROJECT" --format="value(projectNumber)")
  given="$(argument_of service-account ${TPU_CREATE_FLAGS[@]+"${TPU_CREATE_FLAGS[@]}"})"
  if [ -z "$given" ]; then
    show "${command[@]}"
    [ "$DRY_RUN" = yes ] || number="$("${command[@]}")"
    given="$number-compute@developer.gserviceaccount.com"
  fi
  echo "$given"
}

case "$RUN_BUCKET" in
  gs://?*) ;;
  *) die "RUN_BUCKET in $VARIABLES is a bucket such as gs://my-runs, not '$RUN_BUCKET'" ;;
esac
bucket="gs://$(echo "${RUN_BUCKET#gs://}" | cut -d / -f 1)"

say "APIs of project $TPU_PROJECT"
run gcloud services enable tpu.googleapis.com compute.googleapis.com storage.googleapis.com --project="$TPU_PROJECT"
run gcloud compute tpus tpu-vm service-identity create "${PLACE[@]}"

say "bucket $bucket"
describe=(gcloud storage buckets describe "$bucket" --project="$TPU_PROJECT" --format="value(name)")
show "${describe[@]}"
if [ "$DRY_RUN" = yes ] || ! "${describe[@]}" >/dev/null 2>&1; then
  run gcloud storage buckets create "$bucket" --project="$TPU_PROJECT" --location="${TPU_ZONE%-*}" \
    --uniform-bucket-level-access
fi
member="serviceAccount:$(account)"
run gcloud storage buckets add-iam-policy-binding "$bucket" --project="$TPU_PROJECT" --member="$member" \
  --role=roles/storage.objectAdmin
say "done; next: bash launch/tpu/create.sh"
