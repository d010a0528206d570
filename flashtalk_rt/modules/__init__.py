"""The networks and what surrounds them, as pure torch modules and functions."""
