"""Parts of `benchmarks/accuracy.py`: what is compared, how one model trains, what is kept."""
