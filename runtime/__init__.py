"""What surrounds the steps of a run: its folder, checks, guards, metrics and pictures."""
