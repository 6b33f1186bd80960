"""What governed programs send through TLS libraries: probes, where they sit, and what their records mean."""
