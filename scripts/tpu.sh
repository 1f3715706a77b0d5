#!/usr/bin/env bash
# Cloud TPU VMs, from a single host to several slices:    scripts/tpu.sh --help
# Everything is a queued resource, whose nodes (slices) and workers (hosts) all get the same commands. A run lives on
# the workers, not in this terminal: ~/jaxlm is the repository there, ~/jaxlm.log what the run says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'HELP'
scripts/tpu.sh VERB [--flag=value ...] [-- ARGUMENTS]

  create            ask for the TPU and wait until it is there (Ctrl-C leaves the request in the queue)
  setup             copy this repository at its current commit to every worker and install it there
  train -- FLAGS    start `jaxlm train FLAGS` on every worker and watch it; called again, go on watching. With --spot a
                    TPU that was taken away is made and set up again, and the same command goes on from its checkpoint
  logs              follow what the run says
  ssh [-- COMMAND]  a shell on a worker, or a command in ~/jaxlm with its environment
  status            the TPU's state, and the run's
  delete            delete the TPU; asks first, unless --yes

  flag         variable      what (default)
  --name       TPU_NAME      of the queued resource, and of its nodes (jaxlm)
  --zone       TPU_ZONE      for example us-central2-b; needed
  --project    TPU_PROJECT   (gcloud's own)
  --type       TPU_TYPE      accelerator type such as v4-8, v5litepod-16, v5p-128, v6e-8; needed to create
  --version    TPU_VERSION   runtime version (the one for the type)
  --slices     TPU_SLICES    how many of that type, joined by the data centre's network (1)
  --spot       TPU_SPOT=1    a cheaper TPU that may be taken away at any time
  --worker     TPU_WORKER    of logs and ssh: a number or all (0)
  --poll       TPU_POLL      seconds between two looks (30)
               LIBTPU_INIT_ARGS   of train: what the TPU's compiler is told, on every worker
               TPU_FLAGS     more flags for `gcloud compute tpus queued-resources create`, for example "--reserved"
HELP
}
say() { echo "tpu: $*"; }
die() { echo "tpu: $*" >&2; exit 1; }

verb=${1:-}
case $verb in
  -h | --help | help | '') usage; exit ;;
  create | setup | train | logs | ssh | status | delete) shift ;;
  *) die "there is no verb '$verb'; choices: create, setup, train, logs, ssh, status, delete" ;;
esac
name=${TPU_NAME:-jaxlm} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-} type=${TPU_TYPE:-} version=${TPU_VERSION:-}
slices=${TPU_SLICES:-1} spot=${TPU_SPOT:-} worker=${TPU_WORKER:-0} poll=${TPU_POLL:-30} yes=
while (($#)); do
  case $1 in
    --name=* | --zone=* | --project=* | --type=* | --version=* | --slices=* | --worker=* | --poll=*)
      flag=${1%%=*}
      printf -v "${flag#--}" %s "${1#*=}" ;;
    --spot) spot=1 ;;
    --yes) yes=1 ;;
    -h | --help) usage; exit ;;
    --) shift; break ;;
    *) die "$verb knows no '$1'; choices: --name --zone --project --type --version --slices --worker --poll (written
--zone=us-central2-b), --spot, --yes, --help; what goes to the TPU stands after --" ;;
  esac
  shift
done
[[ -n $zone ]] || die "--zone or TPU_ZONE is missing, for example --zone=us-central2-b"
case $spot in '' | 0) spot= ;; 1) ;; *) die "TPU_SPOT=$spot is neither 0 nor 1" ;; esac
[[ -n $name ]] || die "--name or TPU_NAME is empty"
[[ $slices =~ ^[1-9][0-9]{0,3}$ ]] || die "--slices=$slices is no number from 1 to 9999"
[[ $poll =~ ^[0-9]+$ ]] || die "--poll=$poll is no number of seconds"
[[ $worker =~ ^(all|[0-9]+)$ ]] || die "--worker=$worker is neither a number nor all"
[[ $verb != create || -n $type ]] || die "--type or TPU_TYPE is missing, for example --type=v5litepod-16"
command -v gcloud >/dev/null || die "gcloud is not on PATH: install the Google Cloud CLI, then run gcloud auth login"

tpus() { gcloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"}; }
on() { # WORKER NODE COMMAND
  tpus queued-resources ssh "$name" --worker="$1" --node="$2" --command="$3"
}
nodes() { if ((slices == 1)); then echo "$name"; else seq -f "$name-%.0f" 0 $((slices - 1)); fi; }

describe() { # KIND NAME FIELD: a state, or MISSING, or UNKNOWN where gcloud could not tell
  local said
  if said=$(tpus "$1" describe "$2" --format="value($3)" 2>&1); then echo "$said"; return; fi
  case $said in *NOT_FOUND* | *"not found"*) echo MISSING ;; *) echo UNKNOWN ;; esac
}

state() { # of the queued resource; where that is ACTIVE, READY or what is amiss with a node
  local found node
  found=$(describe queued-resources "$name" state.state)
  if [[ $found == ACTIVE ]]; then
    for node in $(nodes); do
      found=$(describe tpu-vm "$node" state)
      [[ $found != MISSING ]] || found="GONE" # a node; the queued resource will soon say why
      [[ $found == READY ]] || break
    done
  fi
  echo "$found"
}

create() {
  local where=(--node-id="$name")
  ((slices == 1)) || where=(--node-count="$slices" --node-prefix="$name")
  if [[ -z $version ]]; then
    case $type in
      v6e*) version=v2-alpha-tpuv6e ;;
      v5p*) version=v2-alpha-tpuv5 ;;
      v5lite*) version=v2-alpha-tpuv5-lite ;;
      *) version=tpu-ubuntu2204-base ;;
    esac
  fi
  # shellcheck disable=SC2086 # TPU_FLAGS are words
  tpus queued-resources create "$name" --accelerator-type="$type" --runtime-version="$version" "${where[@]}" \
    ${spot:+--spot} ${TPU_FLAGS:-}
}

remove() { tpus queued-resources delete "$name" --force --quiet; }

ready() { # wait until every node is; fails where that will not be
  local found before=
  while found=$(state) && [[ $found != READY ]]; do
    [[ $found == "$before" ]] || say "$name is $found"
    before=$found
    case $found in FAILED | SUSPENDED | PREEMPTED | MISSING) return 1 ;; esac
    sleep "$poll"
  done
  say "$name is READY"
}

# shellcheck disable=SC2016 # what stands in single quotes is for the workers to expand
# Python 3.11 or newer comes from uv where the image has none; .venv stays, so that a second set-up takes a moment.
INSTALL='mkdir -p ~/jaxlm && cd ~/jaxlm && find . -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} + &&
tar -xzf ~/jaxlm.tar.gz && if ! python3 -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"; then
python3 -m pip install --user --quiet uv && ~/.local/bin/uv python install --quiet 3.12 &&
PYTHON=$(~/.local/bin/uv python find 3.12) && export PYTHON; fi && scripts/setup.sh tpu'

setup() {
  local folder failed=0
  git diff --quiet HEAD || say "changes that are not committed stay here"
  folder=$(mktemp -d) || return
  {
    git archive --format=tar.gz --output="$folder/jaxlm.tar.gz" HEAD &&
      tpus queued-resources scp "$folder/jaxlm.tar.gz" "$name:jaxlm.tar.gz" --worker=all --node=all &&
      on all all "$INSTALL"
  } || failed=1
  rm -r "$folder"
  return $failed
}

# shellcheck disable=SC2016
LOOK='if ps -p "$(cat ~/jaxlm.pid)" -o args= 2>/dev/null | grep -q jaxlm; then echo running
elif ! [ -s ~/jaxlm.exit ]; then echo gone; else code=$(cat ~/jaxlm.exit); if [ "$code" = 0 ] &&
tail -n 9 ~/jaxlm.log | grep -q "stopped by a signal"; then echo stopped; else echo "exit $code"; fi; fi'
look() { on 0 0 "$LOOK" 2>/dev/null | tail -n 1 || true; } # running, exit N, stopped (and saved), gone; or nothing

start() { # COMMAND...
  local command run
  printf -v command '%q ' "$@"
  # shellcheck disable=SC2016
  printf -v run '%q' "$command"'>~/jaxlm.log 2>&1; echo $? >~/jaxlm.exit'
  on all all "cd ~/jaxlm && test -x .venv/bin/jaxlm && export PATH=\"\$PWD/.venv/bin:\$PATH\" && rm -f ~/jaxlm.exit &&
touch ~/jaxlm.log && cat ~/jaxlm.log >>~/jaxlm.earlier.log &&
{ setsid bash -c $run </dev/null >/dev/null 2>&1 & echo \$! >~/jaxlm.pid; }" || return
  say "started on every worker: $command"
}

train() {
  local given=" $* " command=(jaxlm train "$@") found did told before=READY removed= failures=0
  [[ $given == *" --config="* ]] || die "what to train stands after --: train -- --config=FILE --workdir=DIR"
  if [[ -n $spot ]]; then
    [[ $given == *" --workdir="*"://"* ]] || die "--spot: the TPU's disk goes with it, so --workdir must be gs://..."
    [[ -n $type ]] || die "--spot: --type or TPU_TYPE is missing, to make the TPU again when it was taken away"
  fi
  [[ $given == *" --config.distributed="* ]] || command+=(--config.distributed=True)
  ((slices == 1)) || [[ $given == *" --config.mesh.slices="* ]] || command+=(--config.mesh.slices="$slices")
  [[ -z ${LIBTPU_INIT_ARGS:-} ]] || command=(env "LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS" "${command[@]}")
  found=$(state)
  [[ $found == READY || -n $spot && $found != MISSING ]] || die "$name is $found; scripts/tpu.sh create makes it"
  if [[ $found == READY && $(look) != running ]]; then
    start "${command[@]}" || die "the command did not start on every worker; scripts/tpu.sh setup installs it"
  fi
  say "watching every $poll s; Ctrl-C leaves the run alone, scripts/tpu.sh logs shows what it says"
  while true; do
    found=$(state) did=
    [[ $found != READY ]] || did=$(look)
    told=$found
    [[ $found/$did != READY/ ]] || told="READY, but does not answer"
    [[ $told == "$before" ]] || say "$name is $told"
    before=$told
    [[ $found == MISSING ]] || removed=
    [[ -z $removed ]] || found=FAILED # deleted by this loop, and not made yet
    case $found/$did in
      READY/exit*)
        sleep "$poll" # a host that is about to vanish ends its run, too
        [[ $(state) == READY ]] || continue
        [[ $did != "exit 0" ]] || { say "the run is complete"; return; }
        on 0 0 'tail -n 20 ~/jaxlm.log' >&2 || true
        die "the run failed (${did}); scripts/tpu.sh logs shows all of it" ;;
      READY/stopped | READY/gone)
        say "the run is not there any more ($did); it goes on from its last checkpoint"
        if setup && start "${command[@]}"; then failures=0; else ((++failures < 5)) || die "failed five times"; fi ;;
      PREEMPTED/* | TERMINATED/* | STOPPED/* | FAILED/* | SUSPENDED/*)
        [[ -n $spot ]] || die "$name is $found; delete, create, setup and the same train go on from the last checkpoint"
        say "making $name again"
        if { [[ -n $removed ]] || remove; } && removed=1 && create && ready && setup && start "${command[@]}"
        then failures=0
        else ((++failures < 5)) || die "failed five times"; fi ;;
      MISSING/*) die "$name was deleted" ;;
    esac
    sleep "$poll"
  done
}

case $verb in
  create)
    { create && ready; } ||
      die "$name was not made; gcloud compute tpus queued-resources describe $name tells why" ;;
  setup) { ready && setup; } || die "$name could not be set up" ;;
  train) train "$@" ;;
  logs) on "$worker" 0 'tail -n 100 -F ~/jaxlm.log' ;;
  ssh)
    (($#)) || { tpus queued-resources ssh "$name" --worker="$worker" --node=0; exit; }
    printf -v command '%q ' "$@"
    node=0
    [[ $worker != all ]] || node=all
    on "$worker" $node "cd ~/jaxlm && export PATH=\"\$PWD/.venv/bin:\$PATH\" && $command" ;;
  status)
    found=$(state)
    say "$name is $found"
    [[ $found != READY ]] || say "the run: $(look)" ;;
  delete)
    if [[ -z $yes ]]; then
      printf 'Delete %s in %s and all that is on its disks? Type its name: ' "$name" "$zone"
      read -r answer || true
      [[ ${answer:-} == "$name" ]] || die "nothing was deleted; --yes does not ask"
    fi
    remove ;;
esac
