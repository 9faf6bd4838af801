"""Timings beside other packages, and everything one machine can say in limited time. Not part of the wheel."""
