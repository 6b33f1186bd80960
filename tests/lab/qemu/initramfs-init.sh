#!/bin/busybox sh
# The first program of a guest: loads what its disk needs and hands over to that disk's systemd.
B=/bin/busybox
$B mkdir -p /proc /sys /dev /new
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs dev /dev
for module in $($B cat /modules/order); do $B insmod /modules/"$module"; done
waited=0
while [ ! -b /dev/vda ] && [ $waited -lt 100 ]; do $B sleep 0.1; waited=$((waited + 1)); done
if ! $B mount -t ext4 -o rw,noatime /dev/vda /new; then
    echo "lab: the guest's disk cannot be mounted"
    $B poweroff -f
fi
$B umount /proc
$B umount /sys
$B mount --move /dev /new/dev
exec $B switch_root /new /sbin/init
