"""Released models: the names and the layout of their weights, and their config.json."""
