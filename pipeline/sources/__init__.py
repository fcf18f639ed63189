"""A data set's folder → the rows of each split, and where each image lies."""
