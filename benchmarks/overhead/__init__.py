"""Processor time of the program itself, over stages that compute nothing."""
