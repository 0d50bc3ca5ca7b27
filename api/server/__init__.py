"""The HTTP server: routes, admission, keys, health, monitoring, drain."""
