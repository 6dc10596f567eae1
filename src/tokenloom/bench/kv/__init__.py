"""`tokenloom bench kv`: what KV methods cost in quality, and what they save."""
