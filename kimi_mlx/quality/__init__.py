"""How much a quantized model differs from its original, and which of its inputs matter: compare and importance."""
