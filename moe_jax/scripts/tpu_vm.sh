#!/usr/bin/env bash
# Runs this checkout on plain Cloud TPU VMs: one host, several, or several slices.
#
# usage: tpu_vm.sh COMMAND --name NAME --zone ZONE [OPTIONS] [-- ARGUMENTS]
#
#   create    asks for the TPU as a queued resource, and waits until it is there
#   install   copies this checkout to every host, and installs it
#   run       starts `run.py --distributed ARGUMENTS` on every host, in the background
#   logs      follows the log of the first host
#   status    state of the TPU, and on which hosts the run is alive
#   stop      has the run save and stop (SIGTERM), and waits until it has
#   fetch     copies a folder, ARGUMENTS or runs, from the first host to here
#   delete    gives the TPU back
#
#   --type TYPE        accelerator type, such as v5litepod-256 (create)
#   --slices N         so many of it, joined by the data-centre network (create)
#   --version VERSION  software of the VMs; goes by the type if not given (create)
#   --spot             cheaper, and may be taken away (create)
#   --bucket BUCKET    Cloud Storage that every host sees as runs/ (install); several hosts need it
#   --project PROJECT
#   --dry-run          prints every command, and runs none

# What is in single quotes, the hosts expand.
# shellcheck disable=SC2016
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
poll_seconds=${POLL_SECONDS:-30}
# Whether a host's run is alive; a number left over from before a reboot may be another program's by now.
alive='grep -qsa run.py "/proc/$(cat run.pid 2> /dev/null || echo none)/cmdline"'
mount='mkdir -p runs && { mountpoint -q runs || gcsfuse --implicit-dirs "$(cat run.bucket)" runs; }'

fail() {
  echo "$1" >&2
  exit 2
}

usage() {
  sed -n '2,/^$/p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'
}

# Runs a command, or with --dry-run prints it.
run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

queued() {
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$name" "--zone=$zone" ${project:+"--project=$project"} "$@"
}

copy() {
  run gcloud compute tpus queued-resources scp "$@" "--zone=$zone" ${project:+"--project=$project"}
}

everywhere() {
  queued ssh --node=all --worker=all --batch-size=all "--command=$1"
}

on_the_first() {
  queued ssh --node=0 --worker=0 "--command=$1"
}

default_version() {
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "No software is known for --type $1: give --version, see cloud.google.com/tpu/docs/runtimes." ;;
  esac
}

create() {
  [[ $type ]] || fail 'create needs --type, such as v5litepod-256.'
  [[ $version ]] || version=$(default_version "$type")
  local nodes=(--node-id "$name")
  ((slices == 1)) || nodes=(--node-count "$slices" --node-prefix "$name")
  queued create "${nodes[@]}" --accelerator-type "$type" --runtime-version "$version" ${spot:+--spot}
  [[ $dry_run ]] || wait_until_active
}

wait_until_active() {
  local state
  while true; do
    state=$(queued describe '--format=value(state.state)')
    echo "$name: $state"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) fail "$name is $state: delete it, and create it anew." ;;
    esac
    sleep "$poll_seconds"
  done
}

install() {
  local archive
  archive=$(mktemp -d)/moe_jax.tar.gz
  # From the top only: moe_jax/runs and gin/runs are code.
  run tar --create --gzip --file "$archive" --exclude './.*' --exclude ./runs --exclude __pycache__ --directory "$here" .
  copy "$archive" "$name:" --node=all --worker=all --batch-size=all
  everywhere 'mkdir -p moe_jax && tar --extract --gzip --file moe_jax.tar.gz --directory moe_jax'
  # The VMs' own Python is too old; uv brings one.
  everywhere 'command -v ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh
    cd moe_jax && ~/.local/bin/uv venv --allow-existing --python 3.12 .venv &&
    ~/.local/bin/uv pip install --python .venv -r requirements.txt "jax[tpu]" gcsfs'
  [[ $bucket ]] || return 0
  everywhere 'command -v gcsfuse || {
      echo "deb https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list &&
      curl https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo apt-key add - &&
      sudo apt-get update && sudo apt-get install -y gcsfuse
    }
    cd moe_jax && echo '"$(printf %q "$bucket")"' > run.bucket && '"$mount"
}

start() {
  (($#)) || fail 'run needs arguments of run.py after --, such as -- --gin_file=gin/experiments/quickstart.gin'
  local arguments
  arguments=$(printf '%q ' "$@")
  # gcloud starts a command again when the connection breaks: a second run beside the first would ruin both.
  everywhere 'cd moe_jax || exit
    if '"$alive"'; then echo "$(hostname) runs already: stop it first." >&2; exit 1; fi
    if test -e run.bucket; then '"$mount"' || exit; fi
    nohup setsid .venv/bin/python -u run.py --distributed '"$arguments"' >> run.log 2>&1 < /dev/null &
    echo $! > run.pid'
}

command=${1:-}
(($#)) && shift
name='' zone='' project='' type='' version='' bucket='' spot='' dry_run='' slices=1
while (($#)); do
  case $1 in
    --name | --zone | --project | --type | --version | --bucket | --slices)
      (($# > 1)) || fail "$1 needs a value."
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --spot) spot=yes && shift ;;
    --dry-run) dry_run=yes && shift ;;
    --help | -h) usage && exit ;;
    --) shift && break ;;
    *) fail "Unknown argument $1: --help lists them." ;;
  esac
done
[[ $command != --help && $command != -h && $command ]] || { usage && exit; }
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices $slices is no number of slices."
[[ $name ]] || fail "$command needs --name."
[[ $zone ]] || fail "$command needs --zone."

case $command in
  create) create ;;
  install) install ;;
  run) start "$@" ;;
  logs) on_the_first 'tail -n 100 -F moe_jax/run.log' ;;
  status)
    queued describe '--format=value(state.state)'
    everywhere 'cd moe_jax && '"$alive"' && echo "$(hostname) runs" || echo "$(hostname) does not run"'
    ;;
  stop)
    everywhere 'cd moe_jax || exit
      if '"$alive"'; then kill -TERM "$(cat run.pid)" && timeout 600 tail --pid="$(cat run.pid)" -f /dev/null || exit; fi
      echo "$(hostname) does not run"'
    ;;
  fetch) copy "$name:moe_jax/${1:-runs}" . --recurse --node=0 --worker=0 ;;
  delete) queued delete --force --quiet ;;
  *) fail "Unknown command $command: create, install, run, logs, status, stop, fetch or delete." ;;
esac
