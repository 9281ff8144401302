"""`minimind serve`: models of this machine behind OpenAI's protocol."""
