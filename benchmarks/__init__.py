"""Comparisons with other packages, and the measurements of one machine in limited time. Not part of the wheel."""
