"""A model behind OpenAI's HTTP API: what requests say, who works on them, and the routes."""
