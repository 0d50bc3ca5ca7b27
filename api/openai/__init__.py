"""Requests and answers as OpenAI's clients know them."""
