"""Figures and shards → pictures and pages."""
