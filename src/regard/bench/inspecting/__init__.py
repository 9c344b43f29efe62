"""What `regard inspect` does: open a model and an input, look at attention, write a report."""
