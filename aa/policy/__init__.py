"""The policy: files, rules, and the one engine that decides, explains and checks with them."""

from aa.policy.check import Finding
from aa.policy.engine import Policy
from aa.policy.explain import Explanation, Step
from aa.policy.load import load, loads
from aa.policy.words import NO_POLICY

__all__ = ["NO_POLICY", "Explanation", "Finding", "Policy", "Step", "load", "loads"]
