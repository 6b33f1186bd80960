"""Whole guests under QEMU: Debian 12's and Debian 13's own kernel and systemd.

`image` makes their disks, `guest` boots one and brings back what a script in it left behind.
"""
