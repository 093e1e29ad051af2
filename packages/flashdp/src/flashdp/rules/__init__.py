"""Rules: how per-unit gradients of each kind of layer are recorded."""

from flashdp.rules.base import Rule, find_rule, private_class, register_dp_rule

__all__ = ["Rule", "find_rule", "private_class", "register_dp_rule"]
