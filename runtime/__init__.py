"""The surroundings of a run: its folder, checks, guards, metrics and pictures."""
