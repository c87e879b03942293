"""Results for people: the terminal and figures."""
