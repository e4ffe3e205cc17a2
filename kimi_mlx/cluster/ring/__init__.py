"""Start, watch and end the rank processes of a cluster."""
