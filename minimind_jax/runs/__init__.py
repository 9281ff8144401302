"""What stages are assembled from: where a run begins, its models, what it writes at its end."""
