"""aa-gateway: the brain. It decides, keeps the registry of runs, and writes the audit log."""
