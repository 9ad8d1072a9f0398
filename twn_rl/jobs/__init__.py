"""Resumable jobs over files: items to vectors, search in them, hard negatives. Know no training."""
