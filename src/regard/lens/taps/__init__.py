"""How a tap reaches into models: the call, the stations, and a file per kind of model."""
