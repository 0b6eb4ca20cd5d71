"""Where the bytes of shards are: files and their indexes, in a folder of this machine or fetched."""
