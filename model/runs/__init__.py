"""A run: its configuration, its folder, its scores and its pages."""
