"""Compare a quantized model with its original, and measure the importance of the inputs of its matrices."""
