"""Results: values that can be read, printed, saved and loaded without the model that made them."""
