"""Recipes: TOML files read into frozen dataclasses, and widths that meet a budget."""
