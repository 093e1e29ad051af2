"""Prompts, and the lengths of their answers."""

from forelen.data.control import ControlConfig, ControlLM
from forelen.data.forelen import load_forelen
from forelen.data.mini import SCENARIOS, mini_prompts

__all__ = ["SCENARIOS", "ControlConfig", "ControlLM", "load_forelen", "mini_prompts"]
