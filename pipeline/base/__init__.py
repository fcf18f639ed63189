"""What everything else stands on: errors, files, object stores, worker processes, pages."""
