"""Models as pure functions of their trainable leaves; scores of a batch; sampling."""
