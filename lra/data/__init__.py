"""Prepared data sets: their cache, packs, batches and audit."""
