"""Results and shards → pictures and pages."""
