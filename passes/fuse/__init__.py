"""Passes that fold layers into their neighbours; all EXACT."""
