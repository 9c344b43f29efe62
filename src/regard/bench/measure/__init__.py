"""What every measurement shares: clocks, a sentinel, memory, fresh processes, plain data."""
