"""Labels and scores → figures with intervals."""
