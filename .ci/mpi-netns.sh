#!/bin/bash
# Runs an MPI program over two "hosts" of this machine: network namespaces joined by a virtual
# cable, so that the ranks talk TCP, as between machines. Needs root, iproute2 and Open MPI.
#
#   .ci/mpi-netns.sh RANKS_PER_HOST PROGRAM [ARGUMENT...]
#
# Each host has its own network, host name, shared memory and temporary folder; otherwise ranks of
# different hosts would take each other for neighbours.
set -euo pipefail

hosts=(moe-host-a moe-host-b)
addresses=(10.99.7.1 10.99.7.2)

# mpirun calls this script in place of ssh: ADDRESS COMMAND...
if [[ ${1-} == --as-ssh ]]; then
    shift
    while [[ $1 == -* ]]; do shift; done
    address=$1
    shift
    for i in 0 1; do
        if [[ $address == "${addresses[i]}" ]]; then
            exec "$0" --enter "${hosts[i]}" sh -c "$*"
        fi
    done
    echo "$0: no host has the address $address" >&2
    exit 1
fi

# Runs a command on a host: HOST COMMAND...
if [[ ${1-} == --enter ]]; then
    export MOE_HOST=$2
    shift 2
    exec ip netns exec "$MOE_HOST" unshare --uts --ipc --mount bash -c '
        hostname "$MOE_HOST"
        mount --make-rprivate /
        mount -t tmpfs tmpfs /dev/shm
        mkdir -p "/run/$MOE_HOST"
        mount -t tmpfs tmpfs "/run/$MOE_HOST"
        export TMPDIR=/run/$MOE_HOST
        exec "$@"' "$MOE_HOST" "$@"
fi

if (($# < 2)); then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
per_host=$1
shift
self=$(realpath "$0")

remove() {
    for host in "${hosts[@]}"; do
        ip netns delete "$host" 2>/dev/null || true
        rmdir "/run/$host" 2>/dev/null || true
    done
}
trap remove EXIT
remove
for host in "${hosts[@]}"; do
    ip netns add "$host"
done
ip link add cable netns "${hosts[0]}" type veth peer name cable netns "${hosts[1]}"
for i in 0 1; do
    ip -n "${hosts[i]}" address add "${addresses[i]}/24" dev cable
    ip -n "${hosts[i]}" link set lo up
    ip -n "${hosts[i]}" link set cable up
done

# Several hosts share these cores: no binding, and ranks that wait yield.
"$self" --enter "${hosts[0]}" mpirun --allow-run-as-root --bind-to none \
    --mca mpi_yield_when_idle 1 \
    --mca btl_tcp_if_include cable --mca oob_tcp_if_include cable \
    --mca plm_rsh_agent "$self --as-ssh" \
    --host "${addresses[0]}:$per_host,${addresses[1]}:$per_host" \
    -n $((2 * per_host)) "$@"
