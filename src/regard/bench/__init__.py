"""Measuring: which mechanism predicts best on data, and at what cost."""
