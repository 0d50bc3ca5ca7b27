"""POST /v1/responses: OpenAI's newer way to talk with a model."""
