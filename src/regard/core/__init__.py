"""The vocabulary of the house: cards, patterns, checks, visibility, states, budgets, dispatch.

Everything else in `regard` is written in these words; nothing here knows any mechanism.
"""
