"""Starting and ending governed runs: the aa-launch service, the sandbox it asks systemd for, and the shim."""
