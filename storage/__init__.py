"""Arrays and small files in a folder or a bucket."""
