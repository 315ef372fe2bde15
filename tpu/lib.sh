# shellcheck shell=bash
# What the scripts of this folder share: settings, messages, and one function for each thing that gcloud is asked.
set -euo pipefail

SETTINGS=(
  PROJECT ZONE NAME ACCELERATOR MODE MAX_HOURS WAIT_HOURS BACKEND RUNTIME MACHINE_TYPE IMAGE_FAMILY IMAGE_PROJECT DISK_GB
  BUCKET MODELS DATA SERVICE_ACCOUNT POLL_SECONDS SYNC_SECONDS RESTARTS
)
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034 # setup, run use it
ROOT=$(dirname "$HERE")
ME=$(basename "$0")
DRY_RUN=${DRY_RUN:-}
# shellcheck disable=SC2034 # setup, run, status use it
REMOTE=cz-jax # the folder on the slice, in the home folder

say() { echo "tpu/$ME: $*" >&2; }

# fail WHAT NEXT: one line and status 2.
fail() {
  say "$1. Try: $2"
  exit 2
}

usage() {
  sed -n '2,/^[^#]/{/^# shellcheck/d;s/^# \{0,1\}//p;}' "$0"
  exit 0
}

# Settings of the file, below those of the shell.
load_settings() {
  local file=${CZ_TPU_ENV:-$HERE/env} name
  local -A of_shell=()
  for name in "${SETTINGS[@]}"; do
    [ -z "${!name+set}" ] || of_shell[$name]=${!name}
  done
  # shellcheck source=/dev/null
  . "$HERE/env.example"
  if [ -f "$file" ]; then
    # shellcheck source=/dev/null
    . "$file"
  elif [ -n "${CZ_TPU_ENV:-}" ]; then
    fail "$file (CZ_TPU_ENV) does not exist" "cp tpu/env.example $file"
  fi
  for name in "${!of_shell[@]}"; do
    printf -v "$name" %s "${of_shell[$name]}"
  done
}

# want_settings: the settings checked, gcloud, project and zone found.
want_settings() {
  load_settings
  case $MODE in on-demand | flex-start | spot) ;; *) fail "MODE=$MODE is not known" "MODE=spot tpu/$ME" ;; esac
  case $BACKEND in
    tpu-api | compute-engine) ;;
    *) fail "BACKEND=$BACKEND is not known" "BACKEND=tpu-api tpu/$ME" ;;
  esac
  # shellcheck disable=SC2153 # NAME is a setting
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "NAME=$NAME is no name of a machine (lower-case letters, digits, hyphens)" "NAME=cz tpu/$ME"
  [[ -z $BUCKET || $BUCKET =~ ^gs://[a-z0-9] ]] || fail "BUCKET=$BUCKET is no bucket" "BUCKET=gs://my-bucket/cz tpu/$ME"
  local number
  for number in MAX_HOURS WAIT_HOURS DISK_GB POLL_SECONDS SYNC_SECONDS RESTARTS; do
    [[ ${!number} =~ ^[0-9]+$ ]] || fail "$number=${!number} is not a whole number" "$number=20 tpu/$ME"
  done
  if ! command -v gcloud >/dev/null 2>&1; then
    [ -n "$DRY_RUN" ] || fail "gcloud is not installed" "https://cloud.google.com/sdk/docs/install, then gcloud auth login"
  elif [ -z "$PROJECT" ] && [ -z "$DRY_RUN" ]; then
    PROJECT=$(gcloud config get-value project 2>/dev/null || true)
    [ "$PROJECT" != "(unset)" ] || PROJECT=
  fi
  [ -n "$PROJECT" ] || fail "no project is set" "PROJECT=my-project-id in tpu/env, or gcloud config set project my-project-id"
  [ -n "$ZONE" ] || fail "no zone is set" "ZONE=us-west4-a in tpu/env; gcloud compute tpus locations list says which there are"
  WHERE=(--project="$PROJECT" --zone="$ZONE")
  choose_image
}

choose_image() {
  local known="" machine=""
  SEVERAL=yes # hosts
  case $ACCELERATOR in
    v5litepod-1 | v5litepod-4 | v5litepod-8 | v6e-1 | v6e-4 | v6e-8 | v5p-8 | v4-8) SEVERAL="" ;;
  esac
  case $ACCELERATOR in
    v5litepod-[1-9]*) known=v2-alpha-tpuv5-lite ;;
    v5p-[1-9]*) known=v2-alpha-tpuv5 machine=ct5p-hightpu-4t ;;
    v6e-[1-9]*) known=v2-alpha-tpuv6e machine=ct6e-standard-${ACCELERATOR#v6e-}t ;;
    v4-[1-9]*) known=tpu-ubuntu2204-base ;;
    *) fail "ACCELERATOR=$ACCELERATOR is not known" "ACCELERATOR=v5litepod-8 tpu/$ME" ;;
  esac
  if [ "$BACKEND" = compute-engine ] && [ -n "$SEVERAL" ]; then
    fail "ACCELERATOR=$ACCELERATOR is a slice of several hosts, which Compute Engine makes one by one" "BACKEND=tpu-api tpu/$ME"
  fi
  RUNTIME=${RUNTIME:-$known}
  MACHINE_TYPE=${MACHINE_TYPE:-$machine}
  if [ "$BACKEND" = compute-engine ] && [ -z "$MACHINE_TYPE" ]; then
    fail "Compute Engine has no machine type for $ACCELERATOR" "BACKEND=tpu-api tpu/$ME, or ACCELERATOR=v6e-8"
  fi
}

# call COMMAND...: print it in a dry run, otherwise run it.
call() {
  if [ -n "$DRY_RUN" ]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

# asked COMMAND...: like call; a known failure becomes one line that says what to do.
asked() {
  if [ -n "$DRY_RUN" ]; then
    call "$@"
    return
  fi
  local told status=0
  told=$(mktemp)
  "$@" 2>"$told" || status=$?
  cat "$told" >&2
  [ "$status" -eq 0 ] || explain "$(cat "$told")"
  rm -f "$told"
  [ "$status" -eq 0 ] || exit 2
}

explain() {
  local say_again="tpu/$ME"
  case $1 in
    *SERVICE_DISABLED* | *"has not been used in project"* | *"API"*"not enabled"*)
      say "the API is switched off in $PROJECT. Try: gcloud services enable tpu.googleapis.com compute.googleapis.com --project=$PROJECT" ;;
    *[Qq]uota*)
      say "$PROJECT has no quota left for $ACCELERATOR ($MODE) in $ZONE; quotas differ by API, mode and zone. Try: another ZONE or MODE, or ask for more at https://console.cloud.google.com/iam-admin/quotas?project=$PROJECT" ;;
    *PERMISSION_DENIED* | *"does not have permission"* | *"Required '"*)
      say "this account may not do that in $PROJECT. Try: gcloud auth login, and the role TPU Admin (roles/tpu.admin)" ;;
    *"no more capacity"* | *"stockout"* | *STOCKOUT* | *"enough resources"*)
      say "$ZONE has no $ACCELERATOR free. Try: MODE=flex-start $say_again, which waits, or another ZONE" ;;
    *"credentials"* | *"gcloud auth login"*)
      say "gcloud is not signed in. Try: gcloud auth login" ;;
    *) say "gcloud failed (its message is above). Try: $say_again --dry-run, which shows the call" ;;
  esac
}

# state: of the slice, in one of the words MISSING WAITING READY ENDED FAILED, and gcloud's own word behind it.
state() {
  local word
  if [ "$BACKEND" = tpu-api ]; then
    word=$(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format='value(state.state)' 2>/dev/null) || word=
  else
    word=$(gcloud compute instances describe "$NAME" "${WHERE[@]}" --format='value(status)' 2>/dev/null) || word=
  fi
  case $word in
    "") echo "MISSING none" ;;
    ACTIVE | RUNNING) echo "READY $word" ;;
    SUSPENDING | SUSPENDED | STOPPING | STOPPED | TERMINATED | DELETING | PREEMPTED) echo "ENDED $word" ;;
    FAILED) echo "FAILED $word" ;;
    *) echo "WAITING $word" ;;
  esac
}

# on_all TEXT: a shell command on every host.
on_all() {
  if [ "$BACKEND" = tpu-api ]; then
    call gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all --command="$1"
  else
    call gcloud compute ssh "$NAME" "${WHERE[@]}" --command="$1"
  fi
}

# to_all FILE: to the home folder of every host.
to_all() {
  if [ "$BACKEND" = tpu-api ]; then
    call gcloud compute tpus tpu-vm scp "$1" "$NAME:" "${WHERE[@]}" --worker=all
  else
    call gcloud compute scp "$1" "$NAME:" "${WHERE[@]}"
  fi
}

# from_first REMOTE LOCAL: a folder of the first host.
from_first() {
  if [ "$BACKEND" = tpu-api ]; then
    call gcloud compute tpus tpu-vm scp --recurse "$NAME:$1" "$2" "${WHERE[@]}" --worker=0
  else
    call gcloud compute scp --recurse "$NAME:$1" "$2" "${WHERE[@]}"
  fi
}

# still_up: what is being paid for, and how to end it.
still_up() {
  [ -z "$DRY_RUN" ] || return 0
  local now
  now=$(state)
  case $now in
    MISSING*) say "nothing is up: $NAME does not exist in $ZONE" ;;
    ENDED* | FAILED*) say "$NAME in $ZONE is ${now#* }; it may still hold quota. Delete it: tpu/delete" ;;
    WAITING*) say "$NAME in $ZONE is ${now#* } and will cost money once it is up. Withdraw it: tpu/delete" ;;
    *) say "STILL UP AND PAID FOR: $NAME ($ACCELERATOR, $MODE) in $ZONE, project $PROJECT. Delete it: tpu/delete" ;;
  esac
}

want_ready() {
  [ -z "$DRY_RUN" ] || return 0
  local now
  now=$(state)
  case $now in
    READY*) ;;
    MISSING*) fail "there is no slice $NAME in $ZONE" "tpu/create" ;;
    WAITING*) fail "$NAME is not up yet: ${now#* }" "tpu/create, which waits for it" ;;
    *) fail "$NAME is ${now#* }" "tpu/delete, then tpu/create" ;;
  esac
}
