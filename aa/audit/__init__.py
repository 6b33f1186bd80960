"""The audit log: one record per decision, refusal and kernel event, in journald and in a rotating file.

One process writes it (the gateway); everybody else reports to that process.
"""
