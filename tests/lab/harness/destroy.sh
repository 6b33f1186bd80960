#!/bin/sh
# destroy.sh NAME: ends every process of the lab NAME and removes its cgroups; also after a crash, also twice.
# Runs as root in a private mount namespace, where it mounts cgroup2 as boot.sh does.
set -eu
mount -t cgroup2 cgroup2 /sys/fs/cgroup
group=/sys/fs/cgroup/$1
[ -d "$group" ] || exit 0
echo 1 > "$group"/cgroup.kill
tries=0
while grep -q 'populated 1' "$group"/cgroup.events; do
    tries=$((tries + 1)); [ $tries -lt 200 ] || { echo "$group is still populated after 10 s" >&2; exit 1; }
    sleep 0.05
done
find "$group" -depth -type d -exec rmdir {} +
