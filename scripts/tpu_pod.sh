#!/usr/bin/env bash
# Runs a script of this repository on all workers of a TPU pod, and again when the pod was preempted or a worker lost.
#
#   scripts/tpu_pod.sh --pod my-pod --zone us-central2-b [--restarts 20] [--folder rlhf_jax] -- \
#     scripts/ppo.py --out /gcs/runs/aligned --mesh fsdp=256 …
#
# The pod exists (as a queued resource it comes back by itself after a preemption), this repository lies in --folder of
# each worker's home with its .venv made by `make setup EXTRAS=tpu`, and the run's folder is one that all workers share:
# a bucket mounted by gcsfuse, or a Filestore. Workers find each other by themselves (--distributed is added here).
#
# Nobody could try this file on a pod: there is none where it was written. shellcheck has read it, tests/test_tpu_pod.py
# runs it with a gcloud of its own, and what it starts was tried by scripts/local_cluster.py.
set -euo pipefail

# As in rlhf_jax/parallel/processes.py and rlhf_jax/cli/process.py: a mistake of the user's, or a stop on demand. The same again would
# end the same, or is not wanted.
readonly MISTAKE=2 INTERRUPTED=130 TERMINATED=143

refuse() {
  echo "tpu_pod: $1; use scripts/tpu_pod.sh --pod NAME --zone ZONE [--restarts N] [--folder PATH] -- scripts/STAGE.py …" >&2
  exit "$MISTAKE"
}

pod='' zone='' restarts=20 folder=rlhf_jax
while (($#)); do
  case $1 in
    --pod | --zone | --restarts | --folder)
      (($# > 1)) || refuse "$1: found nothing behind it, wanted a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --) break ;;
    *) refuse "found $1, wanted --pod, --zone, --restarts, --folder, or -- before the script" ;;
  esac
done
[[ $pod ]] || refuse '--pod: found nothing, wanted the name of the pod'
[[ $zone ]] || refuse '--zone: found nothing, wanted the zone of the pod'
[[ $restarts =~ ^[0-9]+$ ]] || refuse "--restarts: found $restarts, wanted a whole number"
(($# > 1)) || refuse 'found no script, wanted -- and then what the workers run'
shift

# On all workers at once. gcloud's status is not 0 if that of any worker is not.
on_all() {
  gcloud compute tpus tpu-vm ssh "$pod" --zone "$zone" --worker=all --command "$1"
}

pod_state() {
  gcloud compute tpus tpu-vm describe "$pod" --zone "$zone" --format 'value(state)' 2>/dev/null || echo absent
}

await_pod() {
  local state
  until state=$(pod_state) && [[ $state == READY ]]; do
    ((stopped)) && exit "$TERMINATED"
    echo "tpu_pod: $pod is $state; looking again in a minute" >&2
    sleep 60
  done
}

printf -v command '%q ' "$@"
# The process's id is kept, so that the next start ends what this one left behind, and that alone: a worker that is
# stuck still holds its chips.
# shellcheck disable=SC2016 # the worker's shell expands them
printf -v start 'cd %q && exec 3>.tpu_pod.lock && flock -n 3 || { kill -KILL "$(cat .tpu_pod.id)"; flock 3; }; ' "$folder"
start+="echo \$\$ >.tpu_pod.id; exec .venv/bin/python $command --distributed"

stop_all() {
  ((stopped += 1))
  on_all "cd $(printf %q "$folder") && kill -TERM \$(cat .tpu_pod.id)" || true
}

stopped=0
# The first Ctrl-C or SIGTERM lets the run save and end.
trap stop_all INT TERM

for ((left = restarts; ; left--)); do
  await_pod
  # Behind the shell, which runs a trap only when it waits for nothing in front of it.
  on_all "$start" &
  child=$!
  while
    seen=$stopped status=0
    wait "$child" || status=$?
    ((stopped > seen)) # the signal ended the waiting, not the run
  do :; done
  if ((status == 0 || status == MISTAKE || status == INTERRUPTED || status == TERMINATED || stopped || left == 0)); then
    exit "$status"
  fi
  echo "tpu_pod: ended with status $status; starting all workers again, $left left" >&2
  sleep 10
done
