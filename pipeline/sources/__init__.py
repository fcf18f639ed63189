"""A dataset's folder → the rows of each split, and the path of each image."""
