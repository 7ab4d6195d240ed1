#!/usr/bin/env bash
# A real Slurm cluster of virtual nodes on this machine, for tests and experiments.
#
#   slurm/cluster.sh up                # start it, or its missing parts; installs Slurm's Debian
#                                      # packages if missing
#   eval "$(slurm/cluster.sh env)"     # let sbatch, srun and squeue use it
#   slurm/cluster.sh status            # show its processes and nodes
#   slurm/cluster.sh crash vn2         # simulate a power loss of a node
#   slurm/cluster.sh start-node vn2    # start the node again
#   slurm/cluster.sh stop-controller   # simulate an outage: jobs continue, commands time out
#   slurm/cluster.sh restart-controller # end the outage; queued jobs are kept
#   slurm/cluster.sh logs [LINES]      # print the ends of all logs
#   slurm/cluster.sh down              # stop it; only its logs are kept
#   slurm/cluster.sh install           # only install the packages
#
# Environment variables (each of several clusters needs its own folder):
#   SLURM_CLUSTER_DIR    folder of all its files   (${TMPDIR:-/tmp}/slurm-cluster)
#   SLURM_CLUSTER_NODES  number of nodes vn1, ...  (4; at most 250)
#   SLURM_CLUSTER_CPUS   CPUs per node             (4; need not exist)
#   SLURM_CLUSTER_GPUS   GPUs per node             (4; need not exist; 0: none)
#   SLURM_CLUSTER_PORT   first port                (a free block from 17800 on)
#   SLURM_CLUSTER_MODE   ns, plain or auto         (auto: ns if the kernel allows it)
#
# Partitions: main; short (at most one minute); grace (preempted with 30 s of grace); high (its jobs
# preempt those of the others).
#
# ns: every node has its own host name, processes, /dev/shm and /etc/hosts, and `crash` removes all
# of them at once. plain: nodes are ordinary processes that share the host name; their names are in
# /etc/hosts until `down`.
set -euo pipefail

PACKAGES=(slurmctld slurmd slurm-client munge)
PROGRAMS=(slurmctld slurmd sbatch munged)
FIRST_PORT=17800 LAST_PORT=19999 # below the ports of megarecur's jobs and the kernel

GIVEN=${SLURM_CLUSTER_DIR:-${TMPDIR:-/tmp}/slurm-cluster}
DIR=$(realpath -m "$GIVEN")
NODES=${SLURM_CLUSTER_NODES:-4}
CPUS=${SLURM_CLUSTER_CPUS:-4}
GPUS=${SLURM_CLUSTER_GPUS:-4}
MODE=${SLURM_CLUSTER_MODE:-auto}
CONF=$DIR/etc/slurm.conf
MARK=$DIR/.slurm-cluster # marks the folder's files as ours to delete
HOSTS_TAG="# slurm cluster $DIR" # marks our lines in /etc/hosts
export SLURM_CONF=$CONF PATH=$PATH:/usr/sbin:/sbin

say() { echo "cluster.sh: $*" >&2; }
die() {
    say "$*"
    exit 1
}
need_root() {
    [ "$(id -u)" = 0 ] || die "$1 must be done by root, as slurmd starts jobs for any user; try sudo -E"
}
refuse_foreign() { # settings are read from the folder, as root: no other user may have made it
    local owner mode
    [ ! -L "${GIVEN%/}" ] || die "SLURM_CLUSTER_DIR=$GIVEN: is a link; name the folder itself"
    [ -e "$DIR" ] || return 0
    read -r owner mode < <(stat -c '%u %a' "$DIR")
    [ "$owner" = 0 ] || [ "$owner" = "$(id -u)" ] ||
        die "SLURM_CLUSTER_DIR=$DIR: belongs to user $owner; name a folder of your own"
    if ((8#$mode & 8#022)); then
        die "SLURM_CLUSTER_DIR=$DIR: other users can write it (mode $mode); name a folder of your own"
    fi
}
wait_for() { # SECONDS WHAT COMMAND...: wait until the command succeeds
    local tries=$(($1 * 10)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((tries-- > 0)) || die "$what: not ready in time; see $DIR/log"
        sleep 0.1
    done
}

# ---------------------------------------------------------------------------------------- packages

missing_programs() {
    local program
    for program in "${PROGRAMS[@]}"; do command -v "$program" >/dev/null || echo "$program"; done
}

install() {
    local missing policy=/usr/sbin/policy-rc.d made='' ok=yes
    missing=$(missing_programs)
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null ||
        die "missing: ${missing//$'\n'/, }, and no apt-get to install them; use Debian, or install them"
    [ "$(id -u)" = 0 ] || die "missing: ${missing//$'\n'/, }; as root: apt-get install ${PACKAGES[*]}"
    exec 8<"${policy%/*}"
    flock 8 # one installation at a time, since the policy is shared
    if [ -n "$(missing_programs)" ]; then
        say "installing ${PACKAGES[*]}"
        if [ ! -e "$policy" ]; then # otherwise the machine has its own policy
            printf '#!/bin/sh\nexit 101\n' >"$policy" # apt starts no daemons
            chmod 755 "$policy"
            made=yes
        fi
        apt install -y --no-install-recommends "${PACKAGES[@]}" ||
            { apt update && apt install -y --no-install-recommends "${PACKAGES[@]}"; } || ok=
        [ -z "$made" ] || rm -f "$policy"
    fi
    exec 8<&-
    [ -n "$ok" ] || die "apt-get could not install ${PACKAGES[*]}"
}
apt() { DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 "$@" >&2; }

# --------------------------------------------------------------------------------------- processes
# Daemons do not inherit descriptor 9, the lock of `up`.
# run/NAME.pid holds "PID START_TIME" of a daemon, so that a reused pid is never signalled. A zombie
# counts as ended.

start_time() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" {print $20}'; }
remember() { echo "$2 $(start_time "$2")" >"$DIR/run/$1.pid"; }
pid_of() { # print the pid of a daemon if it is alive
    local pid at
    [ -r "$DIR/run/$1.pid" ] && read -r pid at <"$DIR/run/$1.pid" || return 1
    [ -n "$at" ] && [ "$(start_time "$pid")" = "$at" ] && echo "$pid"
}
stop() { # NAME SIGNAL: send the signal, and SIGKILL after 10 s
    local pid tries=100
    if pid=$(pid_of "$1"); then
        kill "-$2" "$pid" 2>/dev/null || true
        while pid_of "$1" >/dev/null && ((tries-- > 0)); do sleep 0.1; done
        if pid_of "$1" >/dev/null; then
            say "$1 did not stop; killing it"
            kill -KILL "$pid" 2>/dev/null || true
        fi
    fi
    rm -f "$DIR/run/$1.pid"
}

# Print the pids of jobs' processes, of one node or of all, after those of their slurmstepd.
tasks_of() {
    local process keepers='' tasks='' parent
    for process in /proc/[0-9]*; do
        has_variable "$process" "SLURM_CONF=$CONF" "SLURMD_NODENAME=${1:-[^ ]*}" || continue
        tasks+=" ${process#/proc/}"
        parent=$(awk '/^PPid:/ {print $2}' "$process/status" 2>/dev/null) || continue
        [ "$(cat "/proc/$parent/comm" 2>/dev/null)" != slurmstepd ] || keepers+=" $parent"
    done
    echo "$keepers$tasks"
}
has_variable() { # PROCESS PATTERN...: succeed if its environment matches all patterns
    local process=$1 pattern
    shift
    for pattern in "$@"; do
        { tr '\0' '\n' <"$process/environ" | grep -qx "$pattern"; } 2>/dev/null || return 1
    done
}
kill_tasks() {
    local pid
    for pid in $(tasks_of "$@"); do kill -KILL "$pid" 2>/dev/null || true; done
}

# ----------------------------------------------------------------------------------- configuration

choose_mode() {
    case $MODE in
    auto)
        MODE=plain
        if unshare --uts --ipc --mount --pid --fork --mount-proc \
            sh -c 'hostname vn0 && mount -t tmpfs none /dev/shm' 2>/dev/null; then MODE=ns; fi
        ;;
    ns | plain) ;;
    *) die "SLURM_CLUSTER_MODE=$MODE: must be ns, plain or auto" ;;
    esac
}

choose_port() { # one for the controller, and one for each node
    local size=$((NODES + 1)) blocks block tries
    blocks=$(((LAST_PORT - FIRST_PORT) / size))
    block=$((RANDOM % blocks)) # so that clusters that start together rarely conflict
    PORT=${SLURM_CLUSTER_PORT:-}
    for ((tries = 0; tries < blocks && ${PORT:-0} == 0; tries++)); do
        PORT=$((FIRST_PORT + (block + tries) % blocks * size))
        ports_free "$PORT" "$size" || PORT=
    done
    [ -n "$PORT" ] || die "no $size free ports in a row from $FIRST_PORT to $LAST_PORT"
}
ports_free() {
    local port
    for ((port = $1; port < $1 + $2; port++)); do
        if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then return 1; fi
    done
}

write_config() {
    local i address gpus=''
    mkdir -p "$DIR"/{etc,run,log,state,spool,dev}
    chmod 755 "$DIR" "$DIR"/{etc,run,log}
    (umask 077 && head -c 1024 /dev/urandom >"$DIR/etc/munge.key")
    : >"$DIR/etc/plugstack.conf"
    # FirstJobId: jobs derive ports from their ids, and clusters on one machine share its ports.
    # cred_expire: a requeued job waits for that time. NoInAddrAny instead of NoCtldInAddrAny
    # makes srun hang inside jobs.
    cat >"$CONF" <<END
ClusterName=virtual
SlurmctldHost=$(uname -n)(127.0.0.1)
SlurmctldPort=$PORT
FirstJobId=$((1 + PORT * 239 % 387))
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.sock,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.slurmpid
SlurmdPidFile=$DIR/run/slurmd-%n.slurmpid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
SlurmctldDebug=verbose
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
PlugStackConfig=$DIR/etc/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
# Quick decisions, and nothing of a job forgotten for a day.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0,preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
RequeueExit=85
RequeueExitHold=86
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=10
KillWait=5
MinJobAge=86400
END
    if ((GPUS > 0)); then # existing devices, so that Slurm sets CUDA_VISIBLE_DEVICES
        gpus=" Gres=gpu:$GPUS"
        echo "GresTypes=gpu" >>"$CONF"
        : >"$DIR/etc/gres.conf"
        for ((i = 0; i < GPUS; i++)); do
            [ -e "$DIR/dev/gpu$i" ] || mknod "$DIR/dev/gpu$i" c 1 3
            echo "Name=gpu File=$DIR/dev/gpu$i" >>"$DIR/etc/gres.conf"
        done
    fi
    printf '127.0.0.1 localhost\n::1 ip6-localhost\n127.0.0.1 %s\n' "$(uname -n)" >"$DIR/etc/hosts"
    for ((i = 1; i <= NODES; i++)); do
        address=127.0.0.1 # nodes that share a host name also share its address
        [ "$MODE" = plain ] || address=127.77.0.$i
        echo "$address vn$i" >>"$DIR/etc/hosts"
        echo "NodeName=vn$i NodeHostname=vn$i NodeAddr=$address Port=$((PORT + i))" \
            "CPUs=$CPUS RealMemory=64000$gpus State=UNKNOWN" >>"$CONF"
    done
    cat >>"$CONF" <<END
PartitionName=DEFAULT Nodes=ALL State=UP DefaultTime=10 MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE
PartitionName=main Default=YES
PartitionName=short DefaultTime=1 MaxTime=1
PartitionName=grace GraceTime=30
PartitionName=high PriorityTier=10 PreemptMode=OFF
END
    printf '%s=%s\n' MODE "$MODE" PORT "$PORT" NODES "$NODES" >"$DIR/run/settings"
}

share_names() { # add | remove: list plain nodes in the machine's /etc/hosts
    local kept
    [ "$MODE" = plain ] || return 0
    kept=$(grep -vF "$HOSTS_TAG" /etc/hosts || true)
    {
        echo "$kept"
        [ "$1" = remove ] || all_nodes | sed "s|.*|127.0.0.1 & $HOSTS_TAG|"
    } >"$DIR/run/hosts"
    cat "$DIR/run/hosts" >/etc/hosts # in place, since it is often a mount in containers
}

# ----------------------------------------------------------------------------------------- daemons

start_munged() {
    local run=$DIR/run
    ! pid_of munged >/dev/null || return 0
    rm -f "$run"/munge.sock*
    munged --force --foreground --num-threads=2 --key-file="$DIR/etc/munge.key" \
        --socket="$run/munge.sock" --pid-file="$run/munged.mungepid" --seed-file="$run/munge.seed" \
        --log-file="$DIR/log/munged.log" </dev/null >>"$DIR/log/munged.out" 2>&1 9>&- &
    remember munged $!
    wait_for 120 munged munge -n -S "$run/munge.sock"
}

start_slurmctld() {
    ! pid_of slurmctld >/dev/null || return 0
    slurmctld -D -i -f "$CONF" </dev/null >>"$DIR/log/slurmctld.out" 2>&1 9>&- &
    remember slurmctld $!
    wait_for 180 slurmctld scontrol ping
}

start_node() {
    ! pid_of "$1" >/dev/null || return 0
    if [ "$MODE" = ns ]; then
        # bash is the node's first process: it reaps orphans of slurmd, and when it ends, the
        # kernel kills every process of the node and removes its mounts.
        # shellcheck disable=SC2016 # expanded by the inner bash
        unshare --uts --ipc --mount --pid --fork --kill-child=KILL --mount-proc -- bash -c '
            hostname "$1" && mount --bind "$2" /etc/hosts && mount -t tmpfs tmpfs /dev/shm || exit
            slurmd -D -N "$1" -f "$SLURM_CONF" & slurmd=$!
            while kill -0 $slurmd 2>/dev/null; do wait $slurmd; done' node "$1" "$DIR/etc/hosts" \
            </dev/null >>"$DIR/log/slurmd-$1.out" 2>&1 9>&- &
    else
        setsid slurmd -D -N "$1" -f "$CONF" </dev/null >>"$DIR/log/slurmd-$1.out" 2>&1 9>&- &
    fi
    remember "$1" $!
}

all_nodes() { seq -f 'vn%.0f' "$NODES"; }
node_states() { timeout 10 sinfo -h -N -p main -o '%N %t'; }
nodes_ready() {
    [ "$(node_states | grep -c .)" = "$NODES" ] && ! node_states | grep -qE '\*|down|unk'
}
resume_drained() { # nodes drained by an administrator, or by Slurm after a failed job
    local drained
    drained=$(timeout 10 sinfo -h -N -p main -t drain,draining,drained -o %N | sort -u | paste -sd,)
    [ -z "$drained" ] || scontrol update "NodeName=$drained" State=RESUME
}
read_settings() {
    [ -r "$DIR/run/settings" ] || die "no cluster is up in $DIR"
    # shellcheck source=/dev/null
    . "$DIR/run/settings"
}
check_node() {
    all_nodes | grep -qx -- "${1:-}" || die "${1:-no node}: nodes are vn1 to vn$NODES"
}

# ------------------------------------------------------------------------------------- subcommands

up() {
    local node
    # Paths of sockets have at most 107 characters: DIR/spool/vn250/vn250_1234567.4294967291 is one.
    [[ $DIR =~ ^[A-Za-z0-9_./+-]{1,70}$ ]] ||
        die "SLURM_CLUSTER_DIR=$DIR: use at most 70 letters, digits and _ . / + -"
    need_root up
    install
    if [ ! -e "$MARK" ] && [ -n "$(ls -A "$DIR" 2>/dev/null)" ]; then
        die "SLURM_CLUSTER_DIR=$DIR: holds something else; name a folder of its own"
    fi
    mkdir -p "$(dirname "$DIR")"
    mkdir -m 755 "$DIR" 2>/dev/null || true # others may be faster, and are found out
    refuse_foreign
    mkdir -p "$DIR/run"
    touch "$MARK"
    exec 9>"$DIR/run/lock"
    flock 9
    if [ -r "$DIR/run/settings" ]; then
        read_settings # keep ports, key and jobs; start missing parts
    else
        choose_mode
        choose_port
        write_config
    fi
    share_names add
    start_munged
    start_slurmctld
    for node in $(all_nodes); do start_node "$node"; done
    wait_for 300 "nodes" nodes_ready
    resume_drained
    wait_for 300 "nodes" nodes_ready
    say "up: $NODES nodes, mode $MODE, SLURM_CONF=$CONF"
}

down() {
    local node signal=TERM
    [ -e "$MARK" ] && [ -r "$DIR/run/settings" ] || return 0
    need_root down
    read_settings
    [ "$MODE" != ns ] || signal=KILL # the kernel ends the node's processes
    stop slurmctld KILL              # its state is deleted too
    for node in $(all_nodes); do stop "$node" $signal; done
    [ "$MODE" = ns ] || kill_tasks
    stop munged TERM
    share_names remove
    rm -rf "${DIR:?}"/{state,spool,run,etc,dev} # keep the logs
    say "down; its logs: $DIR/log"
}

status() {
    local name code=0
    read_settings
    for name in munged slurmctld $(all_nodes); do
        echo "$name: $(pid_of "$name" || echo 'not running')"
        pid_of "$name" >/dev/null || code=1
    done
    timeout 10 sinfo || code=1
    return $code
}

crash() {
    need_root crash
    read_settings
    check_node "$1"
    stop "$1" KILL
    [ "$MODE" = ns ] || kill_tasks "$1"
}

stop_controller() {
    need_root stop-controller
    read_settings
    stop slurmctld TERM # saves its state first
}

restart_controller() {
    stop_controller
    start_munged
    start_slurmctld
    say "the controller is up again"
}

refuse_foreign
case ${1:-} in
up | down | status | install) "$1" ;;
stop-controller) stop_controller ;;
restart-controller) restart_controller ;;
env) printf 'export SLURM_CONF=%q SLURM_CLUSTER_DIR=%q\n' "$CONF" "$DIR" ;;
crash) crash "${2:-}" ;;
start-node)
    need_root start-node
    read_settings
    check_node "${2:-}"
    start_node "$2"
    ;;
logs) tail -n "${2:-30}" "$DIR"/log/*.log "$DIR"/log/*.out ;;
*)
    sed -n '/^set -/q; s/^# \{0,1\}//; 2,$p' "$0"
    exit 2
    ;;
esac
