"""The studies of `benchmarks/study.py`: a question a file, each with its arms."""
