"""Inspection: workers that read what is inside a decided connection and have each request decided.

`pool` and `handover` are the front's half; `worker` and what it imports run in the child processes.
"""
