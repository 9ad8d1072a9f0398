"""One HTML file about a run, and the pictures in it."""
