"""Changing the attention of models that somebody else trained."""
