"""Published token-level methods: one file each, in a folder named after the hook that they use."""
