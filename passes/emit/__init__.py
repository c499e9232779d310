"""Passes that turn a finished graph into what runs."""
