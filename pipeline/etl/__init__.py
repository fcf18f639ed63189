"""Rows → shards: write, preview, verify, and adopt those that others wrote."""
