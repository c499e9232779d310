"""The families of label rules; `rules.py` says which operation belongs to which."""
