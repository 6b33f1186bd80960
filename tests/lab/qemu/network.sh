#!/bin/sh
# network.sh: gives a guest its network: one link to a namespace `origins`, which is all there is beyond it.
set -eu
ip netns add origins
ip link add veth-box type veth peer name veth-origins netns origins
there() { ip netns exec origins "$@"; }
for side in "here 1 box" "there 2 origins"; do
    # shellcheck disable=SC2086  # three words
    set -- $side
    case $1 in here) run= ;; *) run=there ;; esac
    $run sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0
    $run ip link set lo up
    $run ip link set veth-"$3" up
    $run ip address add 10.77.0."$2"/24 dev veth-"$3"
    $run ip address add fd77::"$2"/64 dev veth-"$3" nodad
done
ip route add default via 10.77.0.2
ip -6 route add default via fd77::2
# Addresses only a cloud would answer on must reach somebody who would notice.
there ip address add 169.254.169.254/32 dev lo
# Debian 13 lets everybody ping, Debian 12 nobody without a capability: what may be tried is the same in both.
sysctl -qw net.ipv4.ping_group_range="0 2147483647"
