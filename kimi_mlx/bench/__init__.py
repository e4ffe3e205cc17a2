"""The benchmark: workloads, the programs that run them, the measurement, and its report."""
