#!/bin/sh
# build-tree.sh WORK SUITE MIRROR SECURITY PACKAGE...: makes WORK/tree, the files of a Debian of that suite,
# and WORK/kernel, its unpacked kernel package. WORK/apt.conf says how this machine reaches its mirror.
# Runs as root in a private mount namespace, so that nothing it mounts can stay behind.
set -eu
work=$1 suite=$2 mirror=$3 security=$4
shift 4
here=$(dirname "$(readlink -f "$0")")
tree=$work/tree

debootstrap --variant=minbase --merged-usr --components=main \
    --keyring=/usr/share/keyrings/debian-archive-keyring.gpg "$suite" "$tree" "$mirror"

mount -t proc proc "$tree"/proc
mount -t tmpfs tmpfs "$tree"/run
cp "$work"/apt.conf "$tree"/etc/apt/apt.conf.d/00lab
printf 'deb %s %s main\n' "$mirror" "$suite" "$security" "$suite-security" > "$tree"/etc/apt/sources.list
printf '#!/bin/sh\nexit 101\n' > "$tree"/usr/sbin/policy-rc.d
chmod 755 "$tree"/usr/sbin/policy-rc.d
# Documentation is a third of the files and no test reads it.
printf 'path-exclude=/usr/share/%s/*\n' doc man info locale > "$tree"/etc/dpkg/dpkg.cfg.d/lab

inside() { chroot "$tree" "$@"; }
install="apt-get install --yes --quiet --quiet --no-install-recommends -o Dpkg::Use-Pty=0"
inside apt-get update --quiet --quiet
inside apt-get dist-upgrade --yes --quiet --quiet -o Dpkg::Use-Pty=0
inside $install "$@"

# The kernel's package is unpacked beside the tree: it ships /lib, which in the tree is a link, and
# installing it would want an initramfs and a boot loader.
image=$(inside apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9][^ ]*\)$/\1/p')
(cd "$tree"/var/tmp && inside sh -c "cd /var/tmp && apt-get download --quiet --quiet -o APT::Sandbox::User=root $image")
dpkg-deb --extract "$tree"/var/tmp/linux-image-*.deb "$work"/kernel
rm "$tree"/var/tmp/linux-image-*.deb

# Of the kernel's modules those that a network, a filter and a virtual disk need.
cd "$work"/kernel
modules=$(echo lib/modules/* usr/lib/modules/*)
modules=$(for m in $modules; do [ ! -d "$m" ] || echo "$m"; done)
release=$(basename "$modules")
rm -rf "$modules"/kernel/sound
find "$modules"/kernel/drivers -mindepth 1 -maxdepth 1 ! -name net ! -name block ! -name virtio ! -name char \
    -exec rm -rf {} +
find "$modules"/kernel/drivers/net -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
mkdir -p "$tree"/usr/lib/modules
cp -a "$modules" "$tree"/usr/lib/modules/
inside depmod "$release"
echo "$release" > "$work"/release

sh "$here"/settle-tree.sh "$tree"
rm -rf "$tree"/usr/sbin/policy-rc.d "$tree"/etc/apt/apt.conf.d/00lab "$tree"/var/lib/apt/lists \
    "$tree"/var/cache/apt/*.bin "$tree"/var/cache/apt/archives
mkdir -p "$tree"/var/lib/apt/lists/partial "$tree"/var/cache/apt/archives/partial
: > "$tree"/etc/apt/sources.list
umount "$tree"/run "$tree"/proc
