"""Reward functions of a user's own, f(prompts, completions, **columns), as in TRL: found, called and checked."""
