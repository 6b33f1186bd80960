#!/bin/sh
# settle-tree.sh TREE: makes a machine of a debootstrapped tree: its name, its people, and the one
# service that runs what the host hands in.
set -eu
tree=$1

for unit in apt-daily.timer apt-daily-upgrade.timer man-db.timer fstrim.timer e2scrub_all.timer \
        e2scrub_reap.service dpkg-db-backup.timer getty@.service serial-getty@.service \
        console-getty.service systemd-firstboot.service systemd-networkd-wait-online.service; do
    ln -sf /dev/null "$tree"/etc/systemd/system/"$unit"
done
: > "$tree"/etc/machine-id
: > "$tree"/etc/fstab
echo box > "$tree"/etc/hostname
printf 'nameserver 10.77.0.2\n' > "$tree"/etc/resolv.conf
printf '127.0.0.1 localhost box\n::1 localhost ip6-localhost ip6-loopback\n' > "$tree"/etc/hosts
sed -i 's/^hosts:.*/hosts: files dns/' "$tree"/etc/nsswitch.conf
mkdir -p "$tree"/var/log/journal

# An empty trust store: there is no public network, and hashing it takes minutes under emulation.
: > "$tree"/etc/ca-certificates.conf
chroot "$tree" update-ca-certificates --fresh

for person in dev:2000 plain:2001; do
    chroot "$tree" useradd --create-home --user-group --uid "${person#*:}" --shell /bin/bash "${person%:*}"
    chmod 700 "$tree"/home/"${person%:*}"
done
for group in docker adm sudo; do
    chroot "$tree" groupadd --system --force "$group"
    chroot "$tree" usermod --append --groups "$group" dev
done

# No dependency on multi-user.target: the script may wait for the machine to have finished starting.
cat > "$tree"/etc/systemd/system/lab.service << 'UNIT'
[Unit]
Description=What the host handed in
After=basic.target dbus.socket

[Service]
Type=exec
ExecStart=/bin/sh /usr/local/sbin/lab-service
StandardInput=null
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
OOMScoreAdjust=-900
UNIT
mkdir -p "$tree"/etc/systemd/system/multi-user.target.wants
ln -s ../lab.service "$tree"/etc/systemd/system/multi-user.target.wants/lab.service

# The second disk is a tar archive with a program named `run`; the third takes a tar archive of what
# the program left in `out`, with its exit code. Both are named by their serials.
cat > "$tree"/usr/local/sbin/lab-service << 'SERVICE'
disk() { for d in /sys/block/vd*; do [ "$(cat "$d"/serial)" != "$1" ] || echo /dev/"${d##*/}"; done; }
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mkdir -p /var/lib/lab/out
cd /var/lib/lab
if tar --extract --file "$(disk lab-input)" --no-same-owner; then
    chmod 755 run
    ./run
    code=$?
else
    code=125
fi
echo "$code" > out/exit
journalctl --sync
journalctl --boot --no-pager --output=short-monotonic > out/journal.txt
tar --create --file "$(disk lab-output)" --directory out .
sync
udevadm settle --timeout=30 # it looks at the disk that was just written
echo "lab: exit $code"
systemctl poweroff --force --force
SERVICE
