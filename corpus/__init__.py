"""From text files anywhere to token shards."""
