"""Shards: WebDataset tars, their sidecar files, and the cache for shards that are not local plain tars."""
