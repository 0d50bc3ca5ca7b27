"""The messages between front end and engine, and their form on the wire."""
