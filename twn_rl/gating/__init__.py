"""Where a gate comes from: labels from the loss a thought saves, a threshold, files."""
