"""tokenloom: one engine in which the token is the unit of work."""
