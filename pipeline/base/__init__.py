"""Shared foundations: errors, files, object stores, worker processes, pages."""
