"""Rows → shards: write, preview and verify."""
