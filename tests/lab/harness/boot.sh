#!/bin/sh
# boot.sh NAME STATE REPOSITORY MEMORY: becomes systemd-nspawn with a real systemd over the machine's own root.
# Its standard input is held open by the lab's owner: when it ends, so does the lab.
#
# Runs as root in a private mount namespace (`unshare --mount --propagation private`) and in no
# namespace of the machine otherwise. All that it makes hangs on this one process: mounts and the
# two network namespaces vanish with the mount namespace, processes with the cgroup.
set -eu
name=$1 state=$2 repo=$3 memory=$4
here=$(dirname "$(readlink -f "$0")")
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH

# One cgroup2 tree at the place where systemd expects it, whatever the machine mounts there.
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir /sys/fs/cgroup/"$name"
echo $$ > /sys/fs/cgroup/"$name"/cgroup.procs
exec 3<&0 < /dev/null
(cat <&3 > /dev/null; echo 1 > /sys/fs/cgroup/"$name"/cgroup.kill) &
exec 3<&-

# A /run of its own, with the lab's state in its place: what ip and nspawn keep there is gone with it.
mount -t tmpfs -o mode=755 "$name" "$state"/run
mkdir -p "$state"/run/netns "$state/run/${state#/run/}"
mount --bind "$state" "$state/run/${state#/run/}"
mount --no-mtab --move "$state"/run /run
ip netns add box
ip netns add origins
ip link add veth-box netns box type veth peer name veth-origins netns origins
for side in "box 1" "origins 2"; do
    set -- $side
    ip netns exec "$1" sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0 \
        "net.ipv4.ping_group_range=0 2147483647"  # everybody may ping, so a refused ping is the guard's doing
    ip -n "$1" link set lo up
    ip -n "$1" link set "veth-$1" up
    ip -n "$1" address add "10.77.0.$2/24" dev "veth-$1"
    ip -n "$1" address add "fd77::$2/64" dev "veth-$1" nodad
done
# The default routes lead to the origins, which forward nothing: what leaves is seen there and ends there.
ip -n box route add default via 10.77.0.2
ip -n box -6 route add default via fd77::2
# Addresses only loopback or a cloud would answer on must reach somebody who would notice.
ip -n origins address add 169.254.169.254/32 dev lo

mount -t tmpfs -o "size=$memory,mode=755" "$name" "$state"/tree
mkdir "$state"/tree/upper "$state"/tree/work "$state"/tree/root
mount -t overlay "$name" -o "lowerdir=/,upperdir=$state/tree/upper,workdir=$state/tree/work" "$state"/tree/root
root=$state/tree/root

ip netns exec origins /usr/bin/python3 -I "$here"/origins.py "$state"/origins > "$state"/origins.log 2>&1 &
waited=0
while [ ! -e "$state"/origins/ready ]; do
    kill -0 $! || { echo "the origins did not start:"; cat "$state"/origins.log; exit 1; }
    waited=$((waited + 1)); [ $waited -lt 300 ] || { echo "the origins are not ready after 30 s"; exit 1; }
    sleep 0.1
done

# Nothing that this machine has enabled for itself starts in the container.
find "$root"/etc/systemd/system -mindepth 2 -path '*.wants/*' ! -name 'getty@*' -delete
for unit in apt-daily.timer apt-daily-upgrade.timer man-db.timer fstrim.timer e2scrub_all.timer \
        e2scrub_reap.service dpkg-db-backup.timer systemd-networkd-wait-online.service \
        console-getty.service getty@.service systemd-firstboot.service; do
    ln -sf /dev/null "$root"/etc/systemd/system/"$unit"
done
rm -f "$root"/etc/machine-id "$root"/etc/resolv.conf "$root"/etc/hostname "$root"/etc/default/locale
: > "$root"/etc/machine-id
echo box > "$root"/etc/hostname
printf 'nameserver 10.77.0.2\n' > "$root"/etc/resolv.conf
printf '127.0.0.1 localhost box\n::1 localhost ip6-localhost ip6-loopback\n' > "$root"/etc/hosts
sed -i 's/^hosts:.*/hosts: files dns/' "$root"/etc/nsswitch.conf

# The machine's own settings for its proxies, certificates, services and Python must not reach the container.
rm -rf "$root"/etc/environment "$root"/etc/pip.conf "$root"/etc/gitconfig "$root"/var/log/journal \
    "$root"/usr/sbin/policy-rc.d "$root"/usr/local/share/ca-certificates "$root"/etc/apt/apt.conf.d/*proxy*
# What no package brought there and every interpreter would run: it may write to the trust store.
for hook in "$root"/usr/lib/python3/dist-packages/*.pth "$root"/usr/local/lib/python3*/dist-packages/*.pth; do
    [ ! -e "$hook" ] || dpkg-query --search "${hook#"$root"}" > /dev/null 2>&1 || rm -f "$hook"
done
install -d -m 2755 -g systemd-journal "$root"/var/log/journal

groupadd --prefix "$root" --system --force docker
for person in dev:2000 plain:2001; do
    userdel --prefix "$root" --force "${person%:*}" 2> /dev/null || true
    useradd --prefix "$root" --create-home --non-unique --uid "${person#*:}" --shell /bin/bash "${person%:*}"
done
for group in docker adm sudo; do
    getent group "$group" > /dev/null || groupadd --prefix "$root" --system --force "$group"
    usermod --prefix "$root" --append --groups "$group" dev
done
chmod 700 "$root"/home/dev "$root"/home/plain

install -D -m 644 "$state"/origins/ca.pem "$root"/usr/local/share/ca-certificates/lab-origins.crt
# Without the hooks: the one of Java takes seconds and nothing here asks it.
chroot "$root" update-ca-certificates --hooksdir /nonexistent > "$state"/trust.log 2>&1

# System calls that the programs under test use and that nspawn's own list leaves out.
calls='bpf perf_event_open landlock_create_ruleset landlock_add_rule landlock_restrict_self io_uring_setup io_uring_enter io_uring_register'
exec systemd-nspawn --quiet --directory="$root" --machine="$name" --boot \
    --register=no --keep-unit --console=read-only --kill-signal=SIGRTMIN+3 \
    --network-namespace-path=/run/netns/box --resolv-conf=off --timezone=off --link-journal=no \
    --capability=all --drop-capability=CAP_SYS_MODULE,CAP_SYS_TIME \
    --system-call-filter="$calls" --tmpfs="$repo" --tmpfs=/root:mode=700
