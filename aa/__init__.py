"""Agent Assembly: what AI agents on this host do is decided by one policy and recorded once."""

__version__ = "0.1.0"
