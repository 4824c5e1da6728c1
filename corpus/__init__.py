"""Reads text files from anywhere and writes token shards."""
