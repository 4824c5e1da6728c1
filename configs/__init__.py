"""The configs: default.py explains every field, the others set what differs."""
