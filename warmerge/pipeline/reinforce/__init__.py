"""A policy optimised against a reward: its settings, the reward formula, TRL's trainer, the run and its record."""
