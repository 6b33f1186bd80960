"""Agent Assembly: every action of an AI agent on this host is decided by one policy and recorded once."""

__version__ = "0.1.0"
