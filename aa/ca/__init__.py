"""This host's certificate authority: the root, the proxy's intermediate, leaves, and the trust store."""
