"""What benchmarks share: set-up, measurement, processes and tables, each in one place."""
