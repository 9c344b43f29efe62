"""Benchmarks of compiled forms: cases as data, judged against float64, timed beside torch."""
