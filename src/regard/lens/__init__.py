"""Looking into attention: taps, and what can be read from them."""
