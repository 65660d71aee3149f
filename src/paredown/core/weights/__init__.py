"""Single weights: which go to zero, and how few levels the others need."""
