#!/usr/bin/env bash
# A run on machines that ssh reaches: one process each, the first of them coordinates.
#   HOSTS="gpu-0 gpu-1" tpu_scripts/ssh_hosts.sh [--dry-run] setup
#   HOSTS="gpu-0 gpu-1" tpu_scripts/ssh_hosts.sh run configs/x.py mesh=h100_16 out=/shared/run
# Commands: setup, run, resume, status, stop, delete. `out` is on a file system that all hosts see.
# CODE is the folder on the hosts, PORT a free one of the first host, PYTHON the interpreter in CODE;
# SSH and RSYNC replace the programs. A host that is lost: the others end within processes.timeout
# (60 s), and `resume` with the hosts that are left, or others, goes on from the last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

DRY=0
if [[ "${1:-}" == --dry-run ]]; then DRY=1; shift; fi
COMMAND="${1:?setup, run, resume, status, stop or delete}"; shift
read -r -a hosts <<< "${HOSTS:?e.g. HOSTS=\"gpu-0 gpu-1\"}"
SSH="${SSH:-ssh}" RSYNC="${RSYNC:-rsync}" PORT="${PORT:-8476}" CODE="${CODE:-llmprep_jax}"
PYTHON="${PYTHON:-.venv/bin/python}"

# say what is run, quoted so that it can be pasted, and run it unless this is a dry run
quote() { local w; for w in "$@"; do [[ "$w" =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] && echo -n "$w " || echo -n "${w@Q} "; done; }
say() { quote "$@" | sed 's/ $//'; echo; }
run() { say "$@"; [[ "$DRY" == 1 ]] || "$@"; }
# one host after the other
on_each() { for host in "${hosts[@]}"; do run "$SSH" "$host" "$1"; done; }

setup() {
  local host
  for host in "${hosts[@]}"; do
    # copies the code, without what runs have left; seconds
    run "$RSYNC" -a --delete --exclude=.git --exclude=.venv --exclude=runs ./ "$host:$CODE/"
  done
  # installs it with the CUDA build of JAX; three minutes a host
  on_each "cd $CODE && python3 -m venv .venv && .venv/bin/pip install -q -e '.[cuda,cloud]'"
}

train() {
  : "${1:?a config, and settings}"
  local index said failed=0 pids=()
  for index in "${!hosts[@]}"; do
    said="processes.coordinator=${hosts[0]}:$PORT processes.count=${#hosts[@]} processes.index=$index"
    # the process's number is kept for `stop`; what it says comes to this terminal
    said="cd $CODE && echo \$\$ > train-$index.pid && exec $PYTHON -m experiments.train $(quote "$@")$said"
    say "$SSH" "${hosts[$index]}" "$said"
    if [[ "$DRY" == 0 ]]; then "$SSH" "${hosts[$index]}" "$said" & pids+=($!); fi
  done
  # ends when all have ended; one that fails ends the others by itself
  for index in "${pids[@]}"; do wait "$index" || failed=1; done
  return "$failed"
}

case "$COMMAND" in
  setup) setup ;;
  run | resume) train "$@" ;;                                   # the same command again goes on
  status) on_each "cd $CODE && ps -o pid,etime,cmd -p \$(cat train-*.pid)" ;; # what runs on each host
  stop) on_each "cd $CODE && kill \$(cat train-*.pid)" ;;       # SIGTERM: saves and ends after the step under way
  delete) on_each "rm -rf $CODE" ;;                             # the code on the hosts; not `out`
  *) echo "error: no command $COMMAND; see the first lines of $0" >&2; exit 2 ;;
esac
