"""What reports share: the page, its tables, how pictures look, numbers as text."""
