"""What Paredown promises about time and memory, measured: `python -m benchmarks.run NAME`."""
