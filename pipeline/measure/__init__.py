"""Labels and scores → results with intervals."""
