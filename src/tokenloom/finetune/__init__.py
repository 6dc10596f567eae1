"""Token-level finetuning: datasets, jobs and their durable store, windows, backward, optimizer."""
