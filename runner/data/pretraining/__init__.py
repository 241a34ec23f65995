"""A corpus for training from scratch: documents, shards and a tokenizer."""
