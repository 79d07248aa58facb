#!/usr/bin/env bash
# A run on a Google Cloud TPU pod: every host of it starts the same command and finds the others.
#   TPU=mine ZONE=us-east5-a TYPE=v5p-64 tpu_scripts/tpu_pod.sh [--dry-run] create
#   TPU=mine ZONE=us-east5-a tpu_scripts/tpu_pod.sh run configs/x.py mesh=v5p_64 out=gs://bucket/run
# Commands: create, setup, run, resume, status, stop, delete. A pod that exists needs no create.
# SPOT=1 takes preemptible chips; RUNTIME, CODE (folder there) and PROJECT as gcloud has them.
set -euo pipefail
cd "$(dirname "$0")/.."

DRY=0
if [[ "${1:-}" == --dry-run ]]; then DRY=1; shift; fi
COMMAND="${1:?create, setup, run, resume, status, stop or delete}"; shift
: "${TPU:?a name for the pod}" "${ZONE:?e.g. us-east5-a}"
RUNTIME="${RUNTIME:-v2-alpha-tpuv5}" CODE="${CODE:-llmprep_jax}"
WHERE=(--zone="$ZONE")
if [[ -n "${PROJECT:-}" ]]; then WHERE+=(--project="$PROJECT"); fi

# say what is run, quoted so that it can be pasted, and run it unless this is a dry run
quote() { local w; for w in "$@"; do [[ "$w" =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] && echo -n "$w " || echo -n "${w@Q} "; done; }
say() { quote "$@" | sed 's/ $//'; echo; }
run() { say "$@"; [[ "$DRY" == 1 ]] || "$@"; }
on_all() { run gcloud compute tpus tpu-vm ssh "$TPU" "${WHERE[@]}" --worker=all --command="$1"; }

create() {
  local kind=()
  if [[ "${SPOT:-0}" == 1 ]]; then kind=(--spot); fi
  # asks for the chips; returns in seconds, they come in minutes to days
  run gcloud compute tpus queued-resources create "$TPU" --node-id="$TPU" "${WHERE[@]}" \
    --accelerator-type="${TYPE:?e.g. v5p-64}" --runtime-version="$RUNTIME" "${kind[@]}"
  local ask=(gcloud compute tpus queued-resources describe "$TPU" "${WHERE[@]}" "--format=value(state.state)")
  # asks every half minute until they are there
  run "${ask[@]}"
  until [[ "$DRY" == 1 || "$("${ask[@]}")" == ACTIVE ]]; do sleep 30; done
}

setup() {
  # copies the committed code to every host; seconds
  run git archive --output=/tmp/code.tar HEAD
  run gcloud compute tpus tpu-vm scp /tmp/code.tar "$TPU:" "${WHERE[@]}" --worker=all
  # installs it there; two to three minutes, all hosts at once
  on_all "mkdir -p $CODE && tar -xf code.tar -C $CODE && cd $CODE && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,cloud]'"
}

train() {
  : "${1:?a config, and settings}"
  # starts it on every host, apart from this terminal; the log of each is in its folder
  on_all "cd $CODE && { nohup .venv/bin/python -m experiments.train $(quote "$@")> train.log 2>&1 < /dev/null & echo \$! > train.pid; }"
}

case "$COMMAND" in
  create) create ;;
  setup) setup ;;
  run) train "$@" ;;
  # after a preemption: the old request is cleared away, chips are asked for anew, the run goes on
  resume) run gcloud compute tpus queued-resources delete "$TPU" "${WHERE[@]}" --force --quiet; create; setup; train "$@" ;;
  status) on_all "tail -n 3 $CODE/train.log" ;;        # the last lines of every host; seconds
  stop) on_all "kill \$(cat $CODE/train.pid)" ;;       # SIGTERM: saves and ends after the step under way
  delete) run gcloud compute tpus queued-resources delete "$TPU" "${WHERE[@]}" --force --quiet ;; # two minutes; costs end
  *) echo "error: no command $COMMAND; see the first lines of $0" >&2; exit 2 ;;
esac
