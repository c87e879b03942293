"""One process or many: rows of a batch are shared out, scores gathered, gradients summed, errors agreed on."""
