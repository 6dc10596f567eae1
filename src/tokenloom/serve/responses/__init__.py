"""/v1/responses: OpenAI's newer API for text, over the same engine requests as chat completions."""
