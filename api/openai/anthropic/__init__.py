"""POST /v1/messages: Anthropic's way to talk with a model."""
