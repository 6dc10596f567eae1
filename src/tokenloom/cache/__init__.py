"""KV memory: block pool, prefix cache, and the tensors that hold keys and values."""
