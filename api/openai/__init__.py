"""Requests and answers in the form that OpenAI's clients know."""
