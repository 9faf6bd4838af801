"""Checks of an encoder, gradient reach and recall."""
