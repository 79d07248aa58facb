#!/usr/bin/env bash
# A run under SLURM: one process a GPU, which find each other by SLURM's own variables.
#   NODES=2 GPUS=8 TIME=24:00:00 tpu_scripts/slurm.sh [--dry-run] run configs/x.py mesh=h100_16 out=/shared/run
# Commands: setup, run, resume, status, stop. The code, its .venv and `out` are on a file system that
# all nodes see. NAME is the job's name; PARTITION and ACCOUNT as your cluster wants them.
# A job that is preempted is queued again by SLURM and goes on from its last checkpoint by itself.
set -euo pipefail
cd "$(dirname "$0")/.."

DRY=0
if [[ "${1:-}" == --dry-run ]]; then DRY=1; shift; fi
COMMAND="${1:?setup, run, resume, status or stop}"; shift
NODES="${NODES:-1}" GPUS="${GPUS:-8}" TIME="${TIME:-24:00:00}" NAME="${NAME:-llmprep}"
WHERE=()
if [[ -n "${PARTITION:-}" ]]; then WHERE+=(--partition="$PARTITION"); fi
if [[ -n "${ACCOUNT:-}" ]]; then WHERE+=(--account="$ACCOUNT"); fi

# say what is run, quoted so that it can be pasted, and run it unless this is a dry run
quote() { local w; for w in "$@"; do [[ "$w" =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] && echo -n "$w " || echo -n "${w@Q} "; done; }
say() { quote "$@" | sed 's/ $//'; echo; }
run() { say "$@"; [[ "$DRY" == 1 ]] || "$@"; }

setup() {
  # makes .venv with the CUDA build of JAX on a node that has GPUs; three minutes
  run srun --nodes=1 --ntasks=1 --gpus-per-node=1 --time=0:20:00 "${WHERE[@]}" \
    bash -c "python3 -m venv .venv && .venv/bin/pip install -q -e '.[cuda,cloud]'"
}

train() {
  : "${1:?a config, and settings}"
  local job=(
    --job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS"
    --time="$TIME" --output="$NAME-%j.log" --open-mode=append
    --requeue           # after a preemption the same job starts again
    --signal=TERM@180   # three minutes before the end of the time: it saves and ends
  )
  # queues the job; returns at once, and it starts when the nodes are free
  # --kill-on-bad-exit: one process that fails takes the others with it, should they not notice
  run sbatch "${job[@]}" "${WHERE[@]}" \
    --wrap="srun --kill-on-bad-exit=1 .venv/bin/python -m experiments.train $(quote "$@")"
}

case "$COMMAND" in
  setup) setup ;;
  run | resume) train "$@" ;;                        # the same command again goes on
  status)
    run squeue --name="$NAME" --me                   # what is queued and what runs
    run tail -n 3 "$NAME"-*.log                      # the last lines of each job
    ;;
  stop | delete) run scancel --signal=TERM --name="$NAME" --me ;; # saves and ends, after the step under way
  *) echo "error: no command $COMMAND; see the first lines of $0" >&2; exit 2 ;;
esac
