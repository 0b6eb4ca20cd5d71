"""What is read: shard -> record -> sample -> tiles -> token ids -> batch."""
